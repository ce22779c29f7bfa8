"""What `--help` prints."""

import os
from pathlib import Path

import click
import pytest
from cases import invoke, python

from adavit.cli import export, run

HEADINGS = {
    "adavit-run": ["Input", "Operating point", "Measurement", "Output", "Backend", "Compare bundles", "Other options"],
    "adavit-export": [
        "Bundle", "Checks", "Budgets, and images to calibrate on", "Precision, calibrated on --calibration-images",
        "One ONNX file, in the place of a bundle", "TensorRT", "Report and threads", "Other options",
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", [run, export], ids=lambda command: command.name)
def test_options_have_headings_and_examples_follow(command: click.Command) -> None:
    done = invoke(command, "--help")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    headings = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [*HEADINGS[command.name or ""], "Examples"]
    examples = lines[lines.index("Examples:") + 1 :]
    assert sum(line.startswith(f"  {command.name}") for line in examples) >= 5
    assert done.stdout.isprintable() or "\x1b" not in done.stdout, "plain text"


@pytest.mark.parametrize("command", [run, export], ids=lambda command: command.name)
def test_every_option_has_one_heading_and_a_sentence(command: click.Command) -> None:
    text = invoke(command, "--help").stdout
    shown = [line.split() for line in text.splitlines() if line.startswith("  -")]
    names = [word.strip(",") for line in shown for word in line[:3] if word.startswith("--")]
    assert len(names) == len(set(names))
    for option in command.params:
        if isinstance(option, click.Option):
            assert set(option.opts) & set(names), option.name
            assert option.help
            assert option.help[0].isupper() or option.help.startswith("tensorrt: ")
            assert option.help.rstrip()[-1] in ".]" and len(option.help.split()) > 2, option.help


def test_examples_are_of_options_that_there_are() -> None:
    for command in (run, export):
        named = {name for option in command.params for name in option.opts}
        text = (command.epilog or "") + (command.help or "")
        words = {word.strip(",.") for word in text.split()}
        assert {word for word in words if word.startswith("--")} <= named


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_help_to_a_full_disk_is_one_line() -> None:
    code = "import sys; sys.stdout = open('/dev/full', 'w'); from adavit.cli import export; export(prog_name='adavit')"
    done = python(code, "--help", env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "the disk is full" in done.stderr


@pytest.mark.parametrize("columns", [1, 5, 6, 20])
def test_a_narrow_terminal_gets_help(columns: int) -> None:
    done = python("from adavit.entry import run; run()", "--help", env=os.environ | {"COLUMNS": str(columns)})
    assert (done.returncode, done.stderr) == (0, "")
    assert "--images" in done.stdout
