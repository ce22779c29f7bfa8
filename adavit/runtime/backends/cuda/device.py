"""A GPU's memory and its one stream, as backends on a device use them.

Everything is enqueued on one stream, so that what is enqueued later sees what was computed before, and memory that is
no longer used may be used again at once. Host memory is another matter: what is copied from or to it is pinned, and
guarded by events.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.runtime.backends.cuda.bindings import Cuda

__all__ = ["ALIGNMENT", "Allocation", "Device", "size_of"]

ALIGNMENT = 256
"""Bytes that TensorRT wants addresses to be a multiple of."""
UPLOADS = 64
"""Host arrays on their way to the device at most."""


def size_of(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * np.dtype(dtype).itemsize


class Allocation:
    """Memory of a pool, given back when nothing refers to it any more.

    Attributes:
        address: of its first byte.
        size: bytes.
    """

    def __init__(self, pool: Pool, address: int, size: int) -> None:
        self._pool = pool
        self.address = address
        self.size = size

    def __del__(self) -> None:
        self._pool.release(self.address, self.size)

    def as_array(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        """Host memory as an array that keeps the allocation."""
        return np.asarray(_View(self, shape, dtype))


class _View:
    """What numpy makes an array of; the array refers to it, and it to the allocation."""

    def __init__(self, allocation: Allocation, shape: tuple[int, ...], dtype: str) -> None:
        self._allocation = allocation
        kind = np.dtype(dtype).str
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": kind, "data": (allocation.address, False)}


class Pool:
    """Memory on the device or pinned on the host; allocated as it is needed, freed when the device is closed."""

    def __init__(self, cuda: Cuda, allocate: str, free: str) -> None:
        self._cuda = cuda
        self._allocate, self._free = allocate, free
        self._spare: dict[int, list[int]] = {}
        self._lock = threading.RLock()  # an allocation may be given back while one is taken, by the garbage collector
        self._closed = False

    def acquire(self, size: int) -> Allocation:
        """An allocation of at least `size` bytes."""
        size = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
        with self._lock:
            spare = self._spare.get(size)
            address = spare.pop() if spare else int(self._cuda.call(self._allocate, size))
        return Allocation(self, address, size)

    def release(self, address: int, size: int) -> None:
        """Keeps memory for the next one who asks."""
        with self._lock:
            if not self._closed:
                self._spare.setdefault(size, []).append(address)
                return
        self._cuda.call(self._free, address)

    def close(self) -> None:
        """Frees what is spare now, and from now on what is given back."""
        with self._lock:
            self._closed = True
            spare, self._spare = self._spare, {}
        for addresses in spare.values():
            for address in addresses:
                self._cuda.call(self._free, address)


class Device:
    """One stream, the scratch memory of all execution contexts, pools of memory, and the time they take.

    Attributes:
        cuda: the CUDA runtime.
        stream: its handle.
        lock: held while something is enqueued.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.lock = threading.RLock()
        self.stream = cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)
        self.memory = Pool(cuda, "cudaMalloc", "cudaFree")
        self.pinned = Pool(cuda, "cudaMallocHost", "cudaFreeHost")
        self._scratch: Allocation | None = None
        self._scratch_size = ALIGNMENT
        self._events: list[Any] = []
        self._uploads: deque[tuple[Any, Allocation]] = deque()
        self._first: Any = None
        self._times = {"enqueue_ms": 0.0, "gpu_ms": 0.0, "sync_ms": 0.0}

    def reserve(self, size: int) -> None:
        """Asks for scratch memory of at least `size` bytes."""
        self._scratch_size = max(size, self._scratch_size)

    @property
    def scratch(self) -> Allocation:
        """What execution contexts share, since one stream runs one engine at a time."""
        with self.lock:
            if self._scratch is None or self._scratch.size < self._scratch_size:
                self._scratch = self.memory.acquire(self._scratch_size)
            return self._scratch

    def copy(self, target: int, source: int, size: int, kind: str) -> None:
        """Enqueues a copy of bytes; `kind` is HostToDevice, DeviceToHost or DeviceToDevice."""
        kinds = self.cuda.runtime.cudaMemcpyKind
        self.cuda.call("cudaMemcpyAsync", target, source, size, getattr(kinds, f"cudaMemcpy{kind}"), self.stream)

    def upload(self, array: npt.NDArray[Any], address: int) -> None:
        """Enqueues a copy of a host array to the device; the array may change as soon as this returns."""
        with self.lock:
            self.begin()
            while self._uploads and (len(self._uploads) >= UPLOADS or self.cuda.ready(self._uploads[0][0])):
                event, _ = self._uploads.popleft()
                self.cuda.call("cudaEventSynchronize", event)
                self._events.append(event)
            staged = self.pinned.acquire(array.nbytes)
            staged.as_array(array.shape, array.dtype.name)[...] = array
            self.copy(address, staged.address, array.nbytes, "HostToDevice")
            self._uploads.append((self._recorded(), staged))

    def fetch(self, sources: list[tuple[int, int]]) -> list[Allocation]:
        """Copies (address, size) pairs to pinned memory and waits until they are there."""
        with self.lock:
            self.begin()
            fetched = [self.pinned.acquire(size) for _, size in sources]
            for allocation, (address, size) in zip(fetched, sources, strict=True):
                self.copy(allocation.address, address, size, "DeviceToHost")
            first, last = self._first, self._recorded()
            self._first = None
        try:
            start = time.perf_counter()
            self.cuda.call("cudaEventSynchronize", last)
            waited, busy = time.perf_counter() - start, self.cuda.call("cudaEventElapsedTime", first, last)
        finally:
            with self.lock:
                self._events += [first, last]
        with self.lock:
            self._times["sync_ms"] += waited * 1e3
            self._times["gpu_ms"] += float(busy)
        return fetched

    def begin(self) -> None:
        """Marks where the GPU's work since the last fetch begins."""
        if self._first is None:
            self._first = self._recorded()

    @contextmanager
    def enqueuing(self) -> Iterator[None]:
        """Counts the time of what is done inside as enqueuing."""
        self.begin()
        start = time.perf_counter()
        yield
        self._times["enqueue_ms"] += (time.perf_counter() - start) * 1e3

    def timings(self) -> dict[str, float]:
        """Milliseconds since the last call: enqueuing, on the GPU between the first kernel and a fetch, waiting."""
        with self.lock:
            found = self._times
            self._times = dict.fromkeys(found, 0.0)
        return found

    def synchronise(self) -> None:
        """Waits for all that was enqueued."""
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Frees everything but what is still referred to, which is freed when it no longer is."""
        with self.lock:
            self.synchronise()
            self._events += [event for event, _ in self._uploads] + ([self._first] if self._first is not None else [])
            self._uploads.clear()
            for event in self._events:
                self.cuda.call("cudaEventDestroy", event)
            self._events, self._first = [], None
            self._scratch = None
            self.memory.close()
            self.pinned.close()
            self.cuda.call("cudaStreamDestroy", self.stream)

    def _recorded(self) -> Any:
        """An event that says where the stream is now."""
        event = self._events.pop() if self._events else self.cuda.call("cudaEventCreateWithFlags", 0)
        self.cuda.call("cudaEventRecord", event, self.stream)
        return event
