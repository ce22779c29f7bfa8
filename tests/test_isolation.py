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
from adavit.measure import benchmark, run
assert not {"click", "cloup"} & {name.split(".")[0] for name in sys.modules}, "the commands alone need them"
import adavit.cli
loaded = {name.split(".")[0] for name in sys.modules} & {"torch", "onnx", "safetensors"}
parts = {".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("adavit.")}
print(sorted(loaded), sorted(parts & {"adavit.model", "adavit.export", "adavit.training", "adavit.graphs"}))
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
        "compare",
        "draw",
        "export_bundle",
        "export_single_file",
        "load",
    ]
    assert all(getattr(adavit, name).__doc__ for name in adavit.__all__)
    for name in adavit.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(adavit, name), adavit.AdaViTError)


def test_no_public_name_is_that_of_a_module() -> None:
    modules = {path.with_suffix("").name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(adavit.__all__)


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


FLOORS = (
    {"errors", "version"},
    {"architecture", "arguments", "cpus", "entry", "files", "reading", "user_folder"},
    {"macs"},
    {"bundle"},
    {"model", "results"},
    {"datasets", "drawing", "graphs"},
    {"runtime"},
    {"measure", "tensorrt"},
    {"calibration"},
    {"console", "export"},
    {"api", "training"},
    {"__init__", "cli", "cli_train"},
)
"""The rooms of the house, each with what it may import on the floors below."""
PLACES = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ("torch", "onnx", "onnxscript", "safetensors", "click", "cloup", "matplotlib")
LIGHT = ("bundle", "runtime", "drawing", "measure", "datasets", "results", "arguments")
"""What runs without the packages that only export, training and the commands need."""


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if room(path) != "demo")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("adavit.")} & set(PLACES)
    assert {other for other in rooms - {room(path)} if PLACES[other] >= PLACES[room(path)]} == set()
    if room(path) in LIGHT:
        assert not reaches(imported(path), *HEAVY)


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in MODULES} == set(PLACES)


def test_only_backends_name_a_backend() -> None:
    for path in PACKAGE.glob("runtime/*.py"):
        if path.name != "backend.py":
            assert not reaches(imported(path), "onnxruntime", "openvino", "tensorrt", "adavit.runtime.backends")
