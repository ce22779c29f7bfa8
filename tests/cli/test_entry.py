"""Where the commands begin: Ctrl-C while packages are imported is one line, whatever a package makes of it."""

import subprocess

import pytest
from cases import python

START = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("as compiled packages turn it into") from None

sys.meta_path.insert(0, Interrupting())
from adavit import entry
entry.COMMAND()
"""


def start(command: str, module: str, *arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """Starts a command in a process of its own, which is interrupted when it imports a module."""
    return python(before + START.replace("COMMAND", command).replace("MODULE", repr(module)), *arguments)


IMPORTS = [(command, module) for command in ("export", "run", "train") for module in ("click", "adavit.errors")]


@pytest.mark.parametrize(("command", "module"), [*IMPORTS, ("export", "numpy"), ("run", "numpy")])
def test_an_interrupted_import_is_one_line(command: str, module: str) -> None:
    done = start(command, module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"adavit-{command}: interrupted\n")


@pytest.mark.parametrize(
    ("command", "module", "arguments"),
    [
        ("export", "torch", ("demo", "--output", "{folder}/bundle")),
        ("export", "onnx", ("demo", "--output", "{folder}/bundle")),
        ("run", "onnxruntime", ("--iterations", "1")),
        ("run", "openvino", ("--iterations", "1", "--backend", "openvino")),
        ("train", "torch", ("dense", "--data", "{folder}", "--output", "{folder}/run")),
    ],
)
def test_so_is_a_later_one(command: str, module: str, arguments: tuple[str, ...], tmp_path: object) -> None:
    done = start(command, module, *(argument.format(folder=tmp_path) for argument in arguments))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"adavit-{command}: interrupted\n")


def test_an_ignored_interrupt_stays_ignored() -> None:
    done = start("run", "numpy", "--version", before="import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("adavit-run, version")
