"""What benchmarks/gpu.py says where something is missing."""

import sys
from pathlib import Path
from typing import Any

import pytest
from cases import python

REPOSITORY = Path(__file__).parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import gpu  # noqa: E402

from adavit.errors import BackendError  # noqa: E402


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; returns its exit code and what it prints on stderr."""

    def started(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        return gpu.main(), capsys.readouterr().err

    return started


def test_without_a_gpu_it_says_so_in_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise BackendError("no NVIDIA GPU can be used here: a reason")

    monkeypatch.setattr(gpu, "Cuda", missing)
    assert run() == (1, "gpu.py: no NVIDIA GPU can be used here: a reason\n")


def test_a_device_needs_neither_torch_nor_onnx() -> None:
    done = python(
        "import sys; sys.modules.update(torch=None, onnx=None); sys.path.insert(0, sys.argv[1]); import gpu, gpu_model;"
        "print(len(gpu_model.rows_of('deit_small', 'published', gpu.GPUS, [1], ['fp16'])))",
        REPOSITORY / "benchmarks",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(gpu.GPUS)


class Some:
    """Stands for CUDA with a GPU."""

    def compute_capability(self) -> int:
        return 75


def test_what_else_is_missing_is_told_in_one_line(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "Cuda", Some)
    monkeypatch.setattr(gpu, "gpu_name", lambda _: "Tesla T4")
    code, line = run("--bundle", tmp_path / "none")
    assert code == 1 and line.startswith(f"gpu.py: {tmp_path}/none") and line.count("\n") == 1
    monkeypatch.setitem(sys.modules, "torch", None)
    code, line = run()
    assert code == 1 and line.startswith("gpu.py: torch is not installed; run: pip install 'adavit[export]'")
    assert line.endswith("; or give --bundle BUNDLE\n") and line.count("\n") == 1
