"""What is public, and what the runtime may not depend on."""

import ast
from pathlib import Path

import pytest
from cases import python

import adavit

PACKAGE = Path(adavit.__file__).parent

RUN = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "safetensors", "matplotlib"):
            raise ImportError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Refused())
import numpy as np
import adavit
runtime = adavit.load(sys.argv[1], threads=1)
assert not {"click", "cloup"} & {name.split(".")[0] for name in sys.modules}
side = runtime.architecture.image_size
images = np.zeros((2, 3, side, side), np.float32)
assert runtime.run(images).logits.shape == runtime.run_dense(images).shape
assert runtime.predict(np.zeros((9, 9), np.uint8))[0].top
assert runtime.draw(images).mode == "RGB"
from adavit.measure import benchmark, evaluate
assert not {"click", "cloup"} & {name.split(".")[0] for name in sys.modules}, "the commands alone need them"
import adavit.cli
loaded = {name.split(".")[0] for name in sys.modules} & {"torch", "onnx", "safetensors"}
parts = {".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("adavit.")}
print(sorted(loaded), sorted(parts & {"adavit.model", "adavit.export", "adavit.training", "adavit.calibration"}))
"""


def test_the_public_names() -> None:
    assert adavit.__all__ == [
        "AdaViTError",
        "BackendError",
        "BundleError",
        "CheckpointError",
        "InputError",
        "Policy",
        "Prediction",
        "Result",
        "Runtime",
        "VerificationError",
        "draw",
        "load",
    ]
    assert all(getattr(adavit, name).__doc__ for name in adavit.__all__)
    for name in adavit.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(adavit, name), adavit.AdaViTError)


def test_running_needs_neither_torch_nor_onnx(tiny_bundle: Path) -> None:
    done = python(RUN, tiny_bundle)
    assert (done.returncode, done.stdout) == (0, "[] []\n"), done.stderr


def imported(path: Path) -> set[str]:
    """Every module a file names in an import, wherever it stands in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def reaches(names: set[str], *forbidden: str) -> set[str]:
    return {name for name in names if any(name == other or name.startswith(f"{other}.") for other in forbidden)}


CORE = [path for part in ("", "bundle/", "runtime/**/", "drawing/") for path in PACKAGE.glob(f"{part}*.py")]
CORE = [path for path in CORE if path.name not in ("cli.py", "entry.py") and not path.name.startswith("console")]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    ours = [f"adavit.{part}" for part in ("model", "export", "training", "calibration", "cli", "console")]
    assert not reaches(imported(path), "torch", "onnx", "onnxscript", "safetensors", *ours)


def test_the_model_knows_neither_export_nor_runtime() -> None:
    for path in PACKAGE.glob("model/*.py"):
        assert not reaches(imported(path), "adavit.export", "adavit.runtime", "adavit.training", "onnx", "onnxruntime")


def test_the_format_knows_nothing_of_what_uses_it() -> None:
    for path in PACKAGE.glob("bundle/*.py"):
        assert not reaches(imported(path), "adavit.runtime", "adavit.export", "adavit.model", "onnxruntime")


def test_only_backends_name_a_backend() -> None:
    for path in PACKAGE.glob("runtime/*.py"):
        if path.name != "backend.py":
            assert not reaches(imported(path), "onnxruntime", "openvino", "tensorrt", "adavit.runtime.backends")
