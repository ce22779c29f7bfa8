"""Where a batch's arrays lie in a lane's memory: on the device and, for what is exchanged, also on the host."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.onnx_format import Value

__all__ = ["ALIGNMENT", "Layout", "aligned"]

ALIGNMENT = 256
"""Bytes that TensorRT wants addresses to be a multiple of."""


def aligned(size: int) -> int:
    """A size, rounded up."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Place(NamedTuple):
    """Some arrays of one shape, one after the other.

    Attributes:
        offset: of the first.
        stride: bytes from one to the next.
        number: how many.
        shape, dtype: of each.
    """

    offset: int
    stride: int
    number: int
    shape: tuple[int, ...]
    dtype: str


class Layout:
    """The places of B images' arrays.

    images, limits [L] and kept [L] go up; kept [L], sizes [L], state [L + 1] and logits come back; these are on the
    host too. rows [2] are x and y in turns. Of arrays that come one for each block, the block's position tells which;
    state[L] is what is left at the end.

    Args:
        arch: the model's shapes.
        batch: images.

    Attributes:
        exchanged: bytes from 0 on that are on the host too.
        size: bytes in all.
    """

    def __init__(self, arch: Architecture, batch: int) -> None:
        depth, width, side = arch.depth, arch.tokens + arch.heads + 2, arch.image_size
        self._rows = batch * arch.tokens + 1
        self.batch = batch
        self._places: dict[str, Place] = {}
        self.size = 0
        self._add("images", 1, (batch, 3, side, side))
        self._add("limits", depth, (batch, 3))
        self._add("kept", depth, (batch, width), "bool")
        self._add("sizes", depth, (4,), "int64")
        self._add("state", depth + 1, (batch,), "int64")
        self._add("logits", 1, (batch, arch.classes))
        self.exchanged = self.size
        self._add("rows", 2, (self._rows, arch.width))
        self._add("decisions", 1, (batch, width))
        self._add("unused", 1, (batch, width), "bool")
        self._add("spare_state", 1, (batch,), "int64")

    def _add(self, name: str, count: int, shape: tuple[int, ...], dtype: str = "float32") -> None:
        stride = aligned(math.prod(shape) * np.dtype(dtype).itemsize)
        self._places[name] = Place(self.size, stride, count, shape, dtype)
        self.size += stride * count

    def at(self, name: str, index: int = 0) -> int:
        """The offset of an array."""
        place = self._places[name]
        return place.offset + index * place.stride

    def end(self, name: str) -> int:
        """The offset behind all arrays of a name."""
        place = self._places[name]
        return place.offset + place.number * place.stride

    def bytes_of(self, name: str) -> int:
        """Of one array."""
        place = self._places[name]
        return math.prod(place.shape) * np.dtype(place.dtype).itemsize

    def view(self, memory: Any, name: str) -> npt.NDArray[Any]:
        """All arrays of a name in memory that begins with this layout, as one array."""
        offset, stride, count, shape, dtype = self._places[name]
        item = np.dtype(dtype)
        inner = np.empty(shape, dtype).strides if 0 not in shape else (item.itemsize,) * len(shape)
        return np.ndarray((count, *shape), item, memory, offset, (stride, *inner))

    def shape(self, value: Value, room: dict[str, int]) -> tuple[int, ...]:
        """The shape of a graph's input or output, with so much room."""
        sizes = {"B": self.batch, "R": self._rows, **room}
        return tuple(sizes[size] if isinstance(size, str) else size for size in value.shape)
