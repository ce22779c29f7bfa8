import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from cases import invoke, refusal
from click.testing import CliRunner

from adavit.cli import export, run
from adavit.cli_train import main
from adavit.console.options.types import Finite
from adavit.console.output import Command, printable, table


def test_names_do_not_command_the_terminal() -> None:
    assert printable("a\x1b[31m\n\x07 b \u65e5") == "a\\x1b[31m\\x0a\\x07 b \u65e5"


@click.command(cls=Command, name="some")
@click.option("--share", type=Finite())
def some(share: float | None) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 17592219598864 bytes")


@pytest.mark.parametrize("share", ["nan", "inf", "-inf"])
def test_numbers_are_finite(share: str) -> None:
    done = CliRunner().invoke(some, ["--share", share])
    assert done.exit_code == 2
    assert f"{share} is not a finite number" in done.output


@pytest.mark.parametrize("command", [[run], [export], [main, "dense"], [main, "adapt"], [main, "evaluate"]])
def test_no_more_threads_than_cpus_bear(command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adavit.cpus.quota_cpus", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    message = "9 threads are too many; give at most 8, 4 for each CPU that this process may use."
    assert message in refusal(invoke(*command, "--threads", 9), code=2)
    assert "threads" not in refusal(invoke(*command, "--threads", 8, "--nope"), code=2)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert "give at most 4," in refusal(invoke(*command, "--threads", 5), code=2)


def test_memory_that_torch_lacks_is_one_line() -> None:
    done = CliRunner().invoke(some)
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "some: error: out of memory; use a smaller --batch" in done.output


def test_columns_are_aligned() -> None:
    assert table([("a", "b"), ("long", "1"), ("c", "22")]) == ["a      b", "long   1", "c     22"]


RUN = ["from adavit.cli import run; run(prog_name='adavit')", "--iterations", "1", "--warmup", "0", "--threads", "1"]
TRAIN = ["from adavit.cli_train import main; main(prog_name='adavit')"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "command",
    [RUN, [*RUN, "--json", "-"], [*RUN, "--help"], [*RUN, "--version"], [*TRAIN, "--help"]],
    ids=lambda command: " ".join(command[1:]),
)
def test_an_output_that_is_full_is_one_line(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is buffered comes again as Python ends
        done = subprocess.run(
            [sys.executable, "-c", *command], stdout=full, stderr=subprocess.PIPE, env=environment, text=True
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.endswith(": error: the disk is full; free some space or write elsewhere\n")
