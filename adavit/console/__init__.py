"""What the commands are asked and what they print."""

from adavit.console.output import (
    Command,
    Progress,
    check_targets,
    end_lines,
    export_lines,
    in_flags,
    printable,
    table,
    write_json,
)

__all__ = [
    "Command",
    "Progress",
    "check_targets",
    "end_lines",
    "export_lines",
    "in_flags",
    "printable",
    "table",
    "write_json",
]
