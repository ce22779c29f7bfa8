import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from double import Gpu, add_double_engines, cuda_double, driver_double, nvrtc_double, trt_double

from adavit.runtime.backends.cuda import bindings as cuda
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
