"""CUDA graphs with conditions on an NVIDIA GPU: `pytest -m gpu`."""

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from adavit.errors import BackendError
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.capture import Recording
from adavit.runtime.backends.cuda.setter import Setter

pytestmark = pytest.mark.gpu

TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3


class Numbers:
    """Eight int64 on the device, and the same in pinned memory."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.stream = cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)
        self.device, self.pinned = int(cuda.call("cudaMalloc", 64)), int(cuda.call("cudaMallocHost", 64))
        self.host = np.frombuffer((ctypes.c_int64 * 8).from_address(self.pinned), np.int64)

    def copy(self, target: int, source: int, stream: Any, size: int = 8, kind: int = ON_DEVICE) -> None:
        kinds = self.cuda.runtime.cudaMemcpyKind
        self.cuda.call("cudaMemcpyAsync", target, source, size, kinds(kind), stream)

    def move(self, target: int, source: int, stream: Any) -> None:
        """Copies a number over another."""
        self.copy(self.device + 8 * target, self.device + 8 * source, stream)

    def close(self) -> None:
        self.cuda.call("cudaFree", self.device)
        self.cuda.call("cudaFreeHost", self.pinned)
        self.cuda.call("cudaStreamDestroy", self.stream)


@pytest.fixture
def numbers() -> Iterator[Numbers]:
    try:
        cuda = Cuda()
    except BackendError as error:
        pytest.skip(str(error))
    found = Numbers(cuda)
    yield found
    found.close()


def test_parts_run_where_numbers_on_the_device_say_so(numbers: Numbers) -> None:
    """The first condition is of number 2, which the graph copies from 0; the second of number 1."""
    cuda, stream = numbers.cuda, numbers.stream
    try:
        setter = Setter(cuda)
    except BackendError as error:
        pytest.skip(str(error))
    with Recording(cuda, stream, setter) as recording:
        numbers.copy(numbers.device, numbers.pinned, stream, 64, TO_DEVICE)
        numbers.move(2, 0, stream)
        conditions = [recording.condition() for _ in range(2)]
        recording.set([(one, numbers.device + 8 * (2 - place)) for place, one in enumerate(conditions)])
        for place, condition in enumerate(conditions):
            with recording.when(condition) as body:
                numbers.move(6 + place, 4 + place, body)
        numbers.copy(numbers.pinned, numbers.device, stream, 64, TO_HOST)
    executable = recording.instantiate()
    for first, second in ((1, 0), (0, 1), (0, 0), (3, 4), (-1, 2)):
        numbers.host[:] = [first, second, 0, 0, 40, 50, 60, 70]
        executable.launch(stream)
        cuda.call("cudaStreamSynchronize", stream)
        wanted = [40 if first > 0 else 60, 50 if second > 0 else 70]
        assert numbers.host[6:].tolist() == wanted, (first, second)
    executable.close()
    setter.close()


def test_a_recording_that_fails_leaves_the_stream_usable(numbers: Numbers) -> None:
    with pytest.raises(BackendError), Recording(numbers.cuda, numbers.stream):
        numbers.move(1, 0, numbers.stream)
        numbers.cuda.call("cudaStreamSynchronize", numbers.stream)
    numbers.copy(numbers.device, numbers.pinned, numbers.stream, 64, TO_DEVICE)
    numbers.cuda.call("cudaStreamSynchronize", numbers.stream)
