"""Where the commands begin, before any package is imported: Ctrl-C is one line from then on."""

from __future__ import annotations

import os
import signal
from importlib import import_module

TYPE_CHECKING = False  # as type checkers read it
if TYPE_CHECKING:
    from types import FrameType

__all__ = ["export", "run", "train"]

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""


def export() -> None:
    """The command `adavit-export`."""
    _start("adavit-export", "adavit.cli", "export")


def run() -> None:
    """The command `adavit-run`."""
    _start("adavit-run", "adavit.cli", "run")


def train() -> None:
    """The command `adavit-train`."""
    _start("adavit-train", "adavit.cli_train", "main")


def _start(command: str, module: str, name: str) -> None:
    """Imports a command and runs it. Ctrl-C ends the import at once: compiled packages make other errors of it."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{command}: interrupted\n".encode())
        os._exit(INTERRUPTED)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, end)
    main = getattr(import_module(module), name)
    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main(prog_name=command)
