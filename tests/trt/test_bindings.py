"""That the double, and so the backend, calls what the installed bindings have, with the arguments they take."""

import inspect
import json
import os
import re
import subprocess
import sys
from enum import IntEnum
from importlib import metadata
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
from cases import random_images
from cuda_machine import Status
from double import Gpu, add_double_engines, cuda_double, driver_double, nvrtc_double, trt_double

import adavit
from adavit.errors import BackendError
from adavit.runtime import Runtime
from adavit.runtime.backends.cuda import bindings as cuda

CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext")
RTX = ("IRuntimeConfig", "IRuntimeCache")
REFIT = {"Refitter": ["refit_cuda_engine"], "OnnxParserRefitter": ["refit_from_bytes"], "Runtime": ["load_runtime"]}


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def trt(request: pytest.FixtureRequest) -> ModuleType:
    return pytest.importorskip(request.param, reason=f"{request.param} is not installed")


def methods(kind: type) -> dict[str, list[str]]:
    """A class's own methods with the names of their arguments, but those that Python itself calls."""
    return {
        name: list(inspect.signature(value).parameters)[1:]
        for name, value in vars(kind).items()
        if isinstance(value, FunctionType) and not name.startswith("__")
    }


def overloads(function: Any) -> list[list[str]]:
    """The names of the arguments of a function of pybind11, from its documentation."""
    lines = re.findall(rf"{function.__name__}\(self: [^,)]+(.*)\) ->", function.__doc__)
    return [re.findall(r"(\w+): ", re.sub(r"\[[^]]*\]", "", line)) for line in lines]


def values_of(kind: Any) -> dict[str, int]:
    """An enumeration of pybind11."""
    return {name: int(member) for name, member in kind.__members__.items()}


def test_methods_of_tensorrt_are_there_and_take_these_arguments(trt: ModuleType) -> None:
    double = trt_double(Gpu(), trt.__name__.replace("_", "-"))
    for kind in CLASSES + RTX * (trt.__name__ == "tensorrt_rtx"):
        for name, arguments in methods(getattr(double, kind)).items():
            found = overloads(getattr(getattr(trt, kind), name))
            assert any(arguments == known[: len(arguments)] for known in found), f"{kind}.{name}{arguments}: {found}"


def test_attributes_and_names_of_tensorrt_are_there(trt: ModuleType) -> None:
    double = trt_double(Gpu(), trt.__name__.replace("_", "-"))
    for name in ("num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"):
        assert isinstance(getattr(trt.ICudaEngine, name), property)
    for name, kind in vars(double).items():
        if isinstance(kind, type) and issubclass(kind, IntEnum):
            assert {member.name: member.value for member in kind} == values_of(getattr(trt, name)), name
    assert all(hasattr(trt.ILogger, name) for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "log"))
    if trt.__name__ == "tensorrt_rtx":
        config = double.IRuntimeConfig()
        for name in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
            assert hasattr(config, name) and isinstance(getattr(trt.IRuntimeConfig, name), property)
        assert hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION")
    for kind, names in REFIT.items():
        assert all(hasattr(getattr(trt, kind), name) for name in names)
    assert trt.Runtime.engine_host_code_allowed  # there, and never set:
    for path in Path(adavit.__file__).parent.rglob("*.py"):
        assert "engine_host_code_allowed" not in path.read_text()


def described(folder: str) -> dict[str, Any]:
    """What the cuda-bindings of a folder have of all that the doubles have; of no folder, those that are installed."""
    doubles = [(cuda_double(gpu), driver_double(gpu), nvrtc_double(gpu)) for gpu in (Gpu(bindings=12), Gpu())]
    functions = {
        module: sorted({name for both in doubles for name in methods(type(both[index]))})
        for index, module in enumerate(("runtime", "driver", "nvrtc"))
    }
    kinds = {name: value for name, value in vars(type(doubles[0][0])).items() if isinstance(value, SimpleNamespace)}
    members = {name: list(vars(kind)) for name, kind in kinds.items()} | {"cudaError_t": list(Status.__members__)}
    major = int(metadata.version("cuda-bindings").split(".")[0])
    if folder:
        (about,) = Path(folder).glob("cuda_bindings-*.dist-info")
        major = int(about.name.split("-")[1].split(".")[0])
    wanted = {"functions": functions, "members": members, "names": cuda.NAMES_12 if major == 12 else {}}
    paths = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("signatures.py")],
        input=json.dumps(wanted), env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert int(found["version"].split(".")[0]) == found["cudart"] // 1000 == major
    return found


@pytest.mark.parametrize("place", range(3), ids="installed {}".format)
def test_functions_of_cuda_are_there_and_take_these_arguments(place: int) -> None:
    """Of the cuda-bindings that are installed, and of others in folders that ADAVIT_CUDA_BINDINGS names."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    folders = ["", *filter(None, os.environ.get("ADAVIT_CUDA_BINDINGS", "").split(os.pathsep))]
    if place >= len(folders):
        pytest.skip("ADAVIT_CUDA_BINDINGS names no more folders with other versions of cuda-bindings")
    found = described(folders[place])
    gpu = Gpu(bindings=found["cudart"] // 1000)
    double = cuda_double(gpu)
    for module, kind in (("runtime", double), ("driver", driver_double(gpu)), ("nvrtc", nvrtc_double(gpu))):
        for name, arguments in methods(type(kind)).items():
            assert found["functions"][module].get(name) == arguments, f"{found['version']}: {name}"
    for name, members in found["members"].items():
        for member, value in members.items():
            assert value == getattr(getattr(double, name), member), f"{found['version']}: {name}.{member}"
    assert found["non_blocking"] == double.cudaStreamNonBlocking
    assert found["captured"] in (None, 7) and not found["refused"]


def test_every_function_of_cuda_that_is_called_is_in_the_double() -> None:
    sources = [path.read_text() for path in Path(cuda.__file__).parent.glob("*.py")]
    called = {name for source in sources for name in re.findall(r'"((?:cu|cuda|nvrtc)[A-Z]\w+)"', source)}
    called -= set(cuda.NAMES_12.values())
    gpu = Gpu()
    doubles = [methods(type(double)) for double in (cuda_double(gpu), driver_double(gpu), nvrtc_double(gpu))]
    assert len(called) > 25
    assert called <= {name for double in doubles for name in double}


def test_tensorrt_says_why_it_reads_no_engine(bundle: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    add_double_engines(bundle, "tensorrt-rtx", version=trt.__version__)
    device = Gpu()
    for name, double in (("runtime", cuda_double), ("driver", driver_double), ("nvrtc", nvrtc_double)):
        monkeypatch.setattr(cuda, f"import_{name}", lambda double=double: double(device))
    with pytest.raises(BackendError, match=r"TensorRT does not read engine stem \(.+\); run: adavit-export"):
        adavit.load(bundle, "tensorrt-rtx", trust_engines=True).run(random_images(runtime.architecture, 1))
