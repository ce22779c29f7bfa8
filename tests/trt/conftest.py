import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import Bench
from double import Gpu, add_double_engines, cuda_double, driver_double, nvrtc_double, trt_double

from adavit.runtime.backends.cuda import bindings as cuda
from adavit.runtime.backends.cuda.setter import Setter
from adavit.runtime.backends.tensorrt import backend as tensorrt


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A double of CUDA and TensorRT in their place."""
    device = Gpu()
    monkeypatch.setattr(cuda, "import_runtime", lambda: cuda_double(device))
    monkeypatch.setattr(cuda, "import_driver", lambda: driver_double(device))
    monkeypatch.setattr(cuda, "import_nvrtc", lambda: nvrtc_double(device))
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda flavour: trt_double(device, flavour))
    yield device
    gc.collect()


@pytest.fixture
def built(bundle: Path) -> Path:
    """The tiny bundle with engines that came from elsewhere."""
    return add_double_engines(bundle)


@pytest.fixture(params=[12, 13], ids="bindings {}".format)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A double of CUDA alone, as both versions of the bindings have it."""
    device = Gpu(bindings=request.param)
    monkeypatch.setattr(cuda, "import_runtime", lambda: cuda_double(device))
    monkeypatch.setattr(cuda, "import_driver", lambda: driver_double(device))
    monkeypatch.setattr(cuda, "import_nvrtc", lambda: nvrtc_double(device))
    return device


@pytest.fixture
def bench(machine: Gpu) -> Iterator[Bench]:
    """Everything is freed at the end, and the stream that was recorded can be used again."""
    found = Bench(machine)
    yield found
    found.put(0, 77)
    found.copy(1, 0, found.stream)
    found.wait()
    assert found.get(1) == 77
    found.close()
    assert not machine.memory and not machine.captures
    assert set(machine.alive.values()) == {0}


@pytest.fixture
def setter(bench: Bench) -> Iterator[Setter]:
    found = Setter(bench.cuda)
    yield found
    found.close()
