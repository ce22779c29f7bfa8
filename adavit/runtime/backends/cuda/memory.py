"""A lane's memory, on the device and on the host, and what copies between them."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.layout import Layout, aligned

__all__ = ["LaneMemory"]


class LaneMemory:
    """Memory for so many images, arranged for the batch that is on its way.

    Args:
        cuda: the CUDA runtime.
        arch: the model's shapes.
        most: images.
        stream: on which copies are enqueued, where no other is named.

    Attributes:
        layout: of the batch.
        numbers: the device's address of 0, 1, 2 ..., as many as rows.
        images, limits, kept, sizes, state, logits: on the host, see `Layout`.
        waited: seconds since `begin` that were spent waiting.
    """

    def __init__(self, cuda: Cuda, arch: Architecture, most: int, stream: int) -> None:
        self._cuda, self._arch, self._stream = cuda, arch, stream
        self._kinds = cuda.runtime.cudaMemcpyKind
        self._device = self._host = self._scratch = self._scratch_size = 0
        self._events: list[Any] = []
        whole, rows = Layout(arch, most), most * arch.tokens + 1
        try:
            self._device = int(cuda.call("cudaMalloc", whole.size + aligned(8 * rows)))
            size = max(whole.exchanged, 8 * rows)
            self._host = int(cuda.call("cudaMallocHost", size))
            self._events = [cuda.call("cudaEventCreateWithFlags", 0) for _ in range(2)]
            self.numbers = self._device + whole.size
            self._bytes = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(self._host))
            np.ndarray((rows,), np.int64, self._bytes)[:] = np.arange(rows)
            self._copy(self.numbers, self._host, 8 * rows, self._kinds.cudaMemcpyHostToDevice, stream)
            cuda.call("cudaStreamSynchronize", stream)
        except BaseException:
            self.close()
            raise
        self.waited = self._began = 0.0
        self.arrange(most)

    def close(self) -> None:
        """Frees everything; nothing may be running."""
        for event in self._events:
            self._cuda.call("cudaEventDestroy", event)
        self._events = []
        for free, address in (("cudaFree", self._device), ("cudaFree", self._scratch), ("cudaFreeHost", self._host)):
            if address:
                self._cuda.call(free, address)
        self._device = self._scratch = self._host = 0

    def arrange(self, batch: int) -> None:
        """Arranges it for a number of images."""
        self.layout = layout = Layout(self._arch, batch)
        names = ("images", "limits", "kept", "sizes", "state", "logits")
        views = (layout.view(self._bytes, name) for name in names)
        self.images, self.limits, self.kept, self.sizes, self.state, self.logits = views

    def scratch(self, size: int) -> tuple[int, int]:
        """Memory that engines use while they run, of at least `size` bytes; what was there before is freed."""
        if size > self._scratch_size:
            if self._scratch:
                self._cuda.call("cudaFree", self._scratch)
            self._scratch = 0
            self._scratch, self._scratch_size = int(self._cuda.call("cudaMalloc", size)), size
        return self._scratch, self._scratch_size

    def lacks(self, size: int) -> bool:
        """Whether `scratch` would move it."""
        return size > self._scratch_size

    def at(self, name: str, index: int = 0) -> int:
        """The device's address of an array."""
        return self._device + self.layout.at(name, index)

    # Copies.

    def upload(self, last: str) -> None:
        """Enqueues a copy to the device of everything up to the arrays of a name."""
        self._copy(self._device, self._host, self.layout.end(last), self._kinds.cudaMemcpyHostToDevice, self._stream)

    def fetch(self, first: str, last: str) -> None:
        """Enqueues a copy to the host of all arrays from one name to another."""
        start, end = self.layout.at(first), self.layout.end(last)
        self._to_host(self._host + start, self._device + start, end - start)

    def fetch_one(self, name: str, index: int) -> None:
        """Fetches an array to its place on the host, and waits for it."""
        offset = self.layout.at(name, index)
        self._to_host(self._host + offset, self._device + offset, self.layout.bytes_of(name))
        self.wait()

    def fetched(self, name: str, index: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Fetches an array that has no place on the host."""
        found = np.empty(shape, np.float32)
        if not found.size:
            return found
        pinned = int(self._cuda.call("cudaMallocHost", found.nbytes))
        try:
            self._to_host(pinned, self.at(name, index), found.nbytes)
            self.wait()
            ctypes.memmove(found.ctypes.data, pinned, found.nbytes)
        finally:
            self._cuda.call("cudaFreeHost", pinned)
        return found

    def move(self, name: str, index: int, target: tuple[str, int], stream: int) -> None:
        """Enqueues a copy of an array to the place of another on the device."""
        size, kind = self.layout.bytes_of(name), self._kinds.cudaMemcpyDeviceToDevice
        self._copy(self.at(*target), self.at(name, index), size, kind, stream)

    def _to_host(self, target: int, source: int, size: int) -> None:
        self._copy(target, source, size, self._kinds.cudaMemcpyDeviceToHost, self._stream)

    def _copy(self, target: int, source: int, size: int, kind: Any, stream: int) -> None:
        self._cuda.call("cudaMemcpyAsync", target, source, size, kind, stream)

    # Times.

    def begin(self) -> None:
        """Marks where a batch begins on the host."""
        self.waited, self._began = 0.0, time.perf_counter()

    def begin_on_device(self) -> None:
        """Marks where it begins on the device."""
        self._cuda.call("cudaEventRecord", self._events[0], self._stream)

    def wait(self) -> None:
        """Waits for what was enqueued."""
        began = time.perf_counter()
        self._cuda.call("cudaEventRecord", self._events[1], self._stream)
        self._cuda.call("cudaEventSynchronize", self._events[1])
        self.waited += time.perf_counter() - began

    def times(self) -> tuple[float, float, float]:
        """Of the batch that was waited for, ms: the host's work, from its start to its end on the device, waiting."""
        spent = time.perf_counter() - self._began
        on_device = float(self._cuda.call("cudaEventElapsedTime", *self._events))
        return 1e3 * (spent - self.waited), on_device, 1e3 * self.waited
