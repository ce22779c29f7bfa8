"""Messages outside the commands name options in Python's words; the commands print them as flags."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cases import invoke

import adavit
from adavit.console import Command, in_flags
from adavit.errors import AdaViTError, OptionError

PACKAGE = Path(adavit.__file__).parent
COMMANDS = {"cli.py", "cli_train.py", "console", "training"}
"""What only the commands print."""
FLAG = re.compile(r"(?<![\w-])--[a-z]")
WHOLE = re.compile(r"adavit-(?:export|run|train)\b[^;`]*")
"""A command from its name on, as far as its sentence goes."""


def texts(path: Path) -> Iterator[str]:
    """The strings of a module; what f-strings put in is a dot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in COMMANDS]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_message_speaks_of_flags(path: Path) -> None:
    assert [text for text in texts(path) if FLAG.search(WHOLE.sub("", text))] == []


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("give `calibration_images`", "give --calibration-images"),
        ("give `force=True` to replace it", "give --force to replace it"),
        ("export with `verify=False`", "export with --no-verify"),
        ("without `with_dense=False`", "without --no-dense"),
        ("`max_drop=0.2` cannot be met", "--max-drop 0.2 cannot be met"),
        ("or `parallel='operators'`", "or --parallel operators"),
        ("then give `provider='CUDAExecutionProvider'`", "then give --provider CUDAExecutionProvider"),
        ("a file `Some Name`, and a `", "a file `Some Name`, and a `"),
    ],
)
def test_words_in_backticks_become_flags(message: str, printed: str) -> None:
    assert in_flags(message) == printed


@pytest.mark.parametrize(("error", "code"), [(OptionError, 2), (AdaViTError, 1)])
def test_a_command_prints_flags(error: type[AdaViTError], code: int) -> None:
    @click.command(cls=Command, name="some")
    def some() -> None:
        raise error("give `calibration_images`")

    done = invoke(some)
    assert (done.exit_code, "give --calibration-images\n" in done.stderr) == (code, True)
