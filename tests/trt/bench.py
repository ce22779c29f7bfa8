"""Two streams and some numbers on a device, as tests of CUDA graphs use them."""

import ctypes
from typing import Any

from double import Gpu

from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.capture import Executable

ON_DEVICE = 3
"""cudaMemcpyDeviceToDevice."""


class Bench:
    """See the module; `numbers` are the addresses of as many allocations."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.cuda = gpu, Cuda()
        self.stream, self.other = (self.cuda.call("cudaStreamCreateWithFlags", 1) for _ in range(2))
        self.numbers = [self.cuda.call("cudaMalloc", 256) for _ in range(8)]

    def put(self, number: int, value: int) -> None:
        ctypes.c_int64.from_address(self.numbers[number]).value = value

    def get(self, number: int) -> int:
        return ctypes.c_int64.from_address(self.numbers[number]).value

    def copy(self, target: int, source: int, stream: Any) -> None:
        self.cuda.call("cudaMemcpyAsync", self.numbers[target], self.numbers[source], 8, ON_DEVICE, stream)

    def wait(self, stream: Any = None) -> None:
        self.cuda.call("cudaStreamSynchronize", stream or self.stream)

    def run(self, executable: Executable) -> None:
        executable.launch(self.stream)
        self.wait()

    def close(self) -> None:
        for number in self.numbers:
            self.cuda.call("cudaFree", number)
        for stream in (self.stream, self.other):
            self.cuda.call("cudaStreamDestroy", stream)
