"""Buffers on a GPU, and moving rows between them: what backends on a device share.

Rows are moved by the bundle's engines `rows.*`, since the host does not reach them.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from adavit.errors import BackendError
from adavit.runtime.backend import Engine, Index, Sizes
from adavit.runtime.backends.device import ALIGNMENT, Block, Device, size_of
from adavit.bundle.bundle import EngineSpec, TensorSpec

__all__ = ["DeviceBuffer", "DeviceMoves", "Rows", "Uploads"]


@dataclass(frozen=True)
class Rows:
    """A tensor on the device: rows of a buffer.

    Attributes:
        block: whose memory it is.
        address: of its first byte.
        shape, dtype: of the tensor.
    """

    block: Block
    address: int
    shape: tuple[int, ...]
    dtype: str


class Uploads:
    """Host arrays among an engine's inputs, each copied to the same place on the device in every run."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._kept: dict[str, Rows] = {}

    def tensors(
        self, spec: EngineSpec, inputs: Sequence[Any], outputs: Sequence[Rows]
    ) -> list[tuple[TensorSpec, Rows]]:
        """An engine's tensors and where they are, uploads enqueued.

        Raises:
            BackendError: one is of another type or rank than the engine's, or not aligned.
        """
        on_device = [self._on_device(tensor, value) for tensor, value in zip(spec.inputs, inputs, strict=True)]
        found = list(zip((*spec.inputs, *spec.outputs), (*on_device, *outputs), strict=True))
        for tensor, rows in found:
            if rows.dtype != tensor.dtype or len(rows.shape) != len(tensor.shape) or rows.address % ALIGNMENT:
                raise BackendError(
                    f"engine {spec.name}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, "
                    f"not {rows.dtype} {list(rows.shape)} at {rows.address:#x}"
                )
        return found

    def _on_device(self, tensor: TensorSpec, value: Any) -> Rows:
        if isinstance(value, Rows):
            return value
        array = np.ascontiguousarray(value, tensor.dtype)
        kept, size = self._kept.get(tensor.name), size_of(array.shape, tensor.dtype)
        block = self._device.memory.take(size) if kept is None or kept.block.size < size else kept.block
        rows = self._kept[tensor.name] = Rows(block, block.address, array.shape, tensor.dtype)
        self._device.upload(array, rows.address)
        return rows


class DeviceBuffer:
    """Memory on the GPU.

    Attributes:
        address: of its first byte.
        shape, dtype: of what it holds.
        nbytes: its size.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str, block: Block | None = None) -> None:
        self._device = device
        self._block = block or device.memory.take(size_of(shape, dtype))
        self.address = self._block.address
        self.shape, self.dtype = shape, dtype
        self.nbytes = size_of(shape, dtype)
        self._rows: dict[int, Rows] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, count: int) -> Rows:
        """See `Buffer.rows`."""
        found = self._rows.get(count)
        if found is None:
            found = self._rows[count] = self.span(0, count)
        return found

    def span(self, start: int, count: int) -> Rows:
        """`count` rows from one on."""
        stride = self.nbytes // self.shape[0]
        return Rows(self._block, self.address + start * stride, (count, *self.shape[1:]), self.dtype)

    def part(self, position: int) -> DeviceBuffer:
        """See `Buffer.part`; a copy where TensorRT would not take the element's address."""
        rows = self.span(position, 1)
        if rows.address % ALIGNMENT:
            part = DeviceBuffer(self._device, self.shape[1:], self.dtype)
            with self._device.lock:
                self._device.copy(part.address, rows.address, part.nbytes, "DeviceToDevice")
        else:
            part = DeviceBuffer(self._device, self.shape[1:], self.dtype, self._block)
            part.address = rows.address
        return part


class Closable(Protocol):
    """An engine that holds more than memory of the host."""

    def close(self) -> None:
        """Frees it; nothing may be running."""
        ...


class DeviceMoves(ABC):
    """What `Backend` says of buffers and moving rows; a backend adds `load`, which notes its engines.

    Once nothing refers to it, they are closed, and what they ran on is freed.
    """

    fixed = None
    always_gathers = False
    on_host = False

    def __init__(self, device: Device) -> None:
        self._device = device
        self._engines: list[Closable] = []  # all that were loaded
        weakref.finalize(self, _close, device, self._engines)
        self._moves: dict[str, Engine] = {}
        self._temporaries: dict[tuple[Any, ...], DeviceBuffer] = {}

    @abstractmethod
    def load(self, name: str, alone: bool = False) -> Engine:
        """See `Backend.load`."""

    def buffer(self, shape: tuple[int, ...], dtype: str = "float32") -> DeviceBuffer:
        """See `Backend.buffer`."""
        return DeviceBuffer(self._device, shape, dtype)

    def prepare(self, used: Mapping[Sizes, float]) -> Mapping[Sizes, float]:
        """See `Backend.prepare`: nothing."""
        return {}

    def upload(self, array: npt.NDArray[Any]) -> DeviceBuffer:
        """See `Backend.upload`."""
        buffer = self.buffer(array.shape, array.dtype.name)
        with self._device.lock:
            self._device.begin()
            self._device.upload(np.ascontiguousarray(array), buffer.address)
        return buffer

    def gather(self, source: DeviceBuffer, kept: Index, into: DeviceBuffer) -> None:
        """See `Backend.gather`."""
        with self._device.lock:
            target = into.rows(len(kept))
            if len(kept) == 1:
                self._copy(source.span(int(kept[0]), 1), target)
            else:
                self._move("gather", [source.rows(len(source)), kept], target)

    def scatter(self, rows: DeviceBuffer, kept: Index, into: DeviceBuffer) -> None:
        """See `Backend.scatter`. TensorRT does not promise to work in place, so the result is copied back."""
        with self._device.lock:
            scattered = self._temporary("scattered", into.shape, into.dtype).rows(len(into))
            whole = into.rows(len(into))
            self._move("scatter", [whole, rows.rows(len(kept)), kept], scattered)
            self._copy(scattered, whole)

    def add(self, source: DeviceBuffer, count: int, vectors: DeviceBuffer, index: int, into: DeviceBuffer) -> None:
        """See `Backend.add`."""
        inputs = [source.rows(count), vectors.rows(len(vectors)), np.asarray([index], np.int64)]
        self._move("add", inputs, into.rows(count))

    def fetch(self, *buffers: DeviceBuffer) -> tuple[npt.NDArray[Any], ...]:
        """See `Backend.fetch`; bfloat16 comes as float32."""
        blocks = self._device.fetch([(buffer.address, buffer.nbytes) for buffer in buffers])
        return tuple(
            _decoded(block.as_array(buffer.shape, buffer.dtype), buffer.dtype)
            for block, buffer in zip(blocks, buffers, strict=True)
        )

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`: as many."""
        return tokens

    def timings(self) -> dict[str, float]:
        """See `Backend.timings`."""
        return self._device.timings()

    def _move(self, name: str, inputs: list[Any], output: Rows) -> None:
        engine = self._moves.get(name)
        if engine is None:
            engine = self._moves[name] = self.load(f"rows.{name}")
        engine.run(inputs, [output])

    def _copy(self, source: Rows, target: Rows) -> None:
        self._device.begin()
        self._device.copy(target.address, source.address, size_of(source.shape, source.dtype), "DeviceToDevice")

    def _temporary(self, use: str, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        """A buffer for what is on its way, one for all threads: what is enqueued later overwrites it later."""
        key = use, shape, dtype
        if key not in self._temporaries:
            self._temporaries[key] = self.buffer(shape, dtype)
        return self._temporaries[key]


def _close(device: Device, engines: list[Closable]) -> None:
    """Frees engines, then what they ran on."""
    with device.lock:
        device.synchronise()
        for engine in engines:
            engine.close()
        engines.clear()
        device.close()


def _decoded(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """What numpy can compute with: a bfloat16 is the upper half of a float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else values
