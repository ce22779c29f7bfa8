"""That the double, and so the backend, calls what the installed bindings have, with the arguments they take."""

import inspect
import re
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
from cases import random_images
from double import Gpu, add_double_engines, cuda_double, trt_double

import adavit
from adavit.errors import BackendError
from adavit.runtime import Runtime
from adavit.runtime.backends.cuda import bindings as cuda

CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext")
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


def test_methods_of_tensorrt_are_there_and_take_these_arguments(trt: ModuleType) -> None:
    double = trt_double(Gpu())
    for kind in CLASSES:
        for name, arguments in methods(getattr(double, kind)).items():
            found = overloads(getattr(getattr(trt, kind), name))
            assert any(arguments == known[: len(arguments)] for known in found), f"{kind}.{name}{arguments}: {found}"


def test_attributes_and_names_of_tensorrt_are_there(trt: ModuleType) -> None:
    double = trt_double(Gpu())
    for name in ("num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"):
        assert isinstance(getattr(trt.ICudaEngine, name), property)
    for name in ("TensorLocation", "ExecutionContextAllocationStrategy"):
        assert all(hasattr(getattr(trt, name), member) for member in vars(getattr(double, name)))
    assert all(hasattr(trt.ILogger, name) for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "log"))
    for kind, names in REFIT.items():
        assert all(hasattr(getattr(trt, kind), name) for name in names)
    assert trt.Runtime.engine_host_code_allowed  # there, and never set:
    for path in Path(adavit.__file__).parent.rglob("*.py"):
        assert "engine_host_code_allowed" not in path.read_text()


def test_functions_of_cuda_are_there_and_take_these_arguments() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    double = cuda_double(Gpu())
    for name, arguments in methods(type(double)).items():
        assert list(inspect.signature(getattr(runtime, name)).parameters) == arguments, name
    for name, value in vars(type(double)).items():
        if isinstance(value, SimpleNamespace):
            assert all(hasattr(getattr(runtime, name), member) for member in vars(value)), name
    assert runtime.cudaError_t.cudaSuccess == 0 and runtime.cudaError_t.cudaErrorNotReady == 600
    assert runtime.cudaStreamNonBlocking == 1


def test_every_function_of_cuda_that_is_called_is_in_the_double() -> None:
    double = cuda_double(Gpu())
    sources = [path.read_text() for path in Path(cuda.__file__).parent.glob("*.py")]
    called = {name for source in sources for name in re.findall(r'"(cuda[A-Z]\w+)"', source)}
    assert len(called) > 15
    assert all(hasattr(double, name) for name in called)


def test_tensorrt_says_why_it_reads_no_engine(bundle: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    add_double_engines(bundle, "tensorrt-rtx", version=trt.__version__)
    monkeypatch.setattr(cuda, "import_runtime", lambda: cuda_double(Gpu()))
    with pytest.raises(BackendError, match=r"TensorRT does not read engine stem \(.+\); run: adavit-export"):
        adavit.load(bundle, "tensorrt-rtx", trust_engines=True).run(random_images(runtime.architecture, 1))
