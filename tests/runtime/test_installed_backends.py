"""Which ONNX Runtime is installed: exactly one of two distributions that overwrite each other."""

import builtins
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import adavit
from adavit.errors import BackendError


def pretend(monkeypatch: pytest.MonkeyPatch, *names: str, imports: bool, cause: BaseException | None = None) -> None:
    """Makes it look as if just these distributions were installed, and importing them failed for some cause."""

    class Distribution:
        def __init__(self, name: str) -> None:
            self.metadata = Message()
            self.metadata["Name"] = name

    real = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "onnxruntime":
            raise ImportError("no shared library", name=name) from cause
        return real(name, *args, **kwargs)

    monkeypatch.setattr(metadata, "distributions", lambda: [Distribution(name) for name in ("numpy", *names)])
    if not imports:
        monkeypatch.setattr(builtins, "__import__", importing)


def fault(bundle: Path) -> str:
    with pytest.raises(BackendError) as caught:
        adavit.load(bundle, threads=1)
    return str(caught.value)


def test_both(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    pretend(monkeypatch, "onnxruntime", "onnxruntime-gpu", imports=True)
    message = fault(tiny_bundle)
    assert "onnxruntime and onnxruntime-gpu are both installed and overwrite each other" in message
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'adavit[cpu]'" in message


def test_neither(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    pretend(monkeypatch, imports=False)
    message = fault(tiny_bundle)
    assert "ONNX Runtime is not installed; run: pip install 'adavit[cpu]' (in a clone: pip install '.[cpu]')" in message
    assert "the extra gpu, and `provider='CUDAExecutionProvider'`" in message


def test_one_that_is_broken(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    pretend(monkeypatch, "onnxruntime-gpu", imports=False)
    assert "onnxruntime-gpu is installed but does not import" in fault(tiny_bundle)


def test_ctrl_c_while_it_is_imported(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    pretend(monkeypatch, "onnxruntime", imports=False, cause=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        adavit.load(tiny_bundle, threads=1)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu", "ONNXRuntime"])
def test_either_will_do(name: str, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    pretend(monkeypatch, name, imports=True)
    assert adavit.load(tiny_bundle, threads=1).labels[0] == "ant"
