"""Host memory as OpenVINO's tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import openvino

__all__ = ["OpenVinoBuffer", "Rows", "as_rows", "from_bfloat16", "rounded", "to_bfloat16"]

STEP = 16
"""Numbers of tokens are rounded up to all tokens less a multiple of this."""

Array = npt.NDArray[Any]


def rounded(tokens: int, all_tokens: int) -> int:
    """The number of rows that are computed for so many tokens."""
    return all_tokens - (all_tokens - tokens) // STEP * STEP


def to_bfloat16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest bfloat16 of finite numbers, which numpy knows as uint16 only; ties go to the even one."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(array: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers that `to_bfloat16` made."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def _tensor(array: Array) -> Any:
    """A tensor of contiguous memory, which it does not keep; uint16 is bfloat16."""
    if array.dtype == np.uint16:
        return openvino.Tensor(array, openvino.Shape(array.shape), openvino.Type.bf16)
    return openvino.Tensor(array, shared_memory=True)


class Rows(NamedTuple):
    """The first rows of an array: their number, a tensor of them, and one of the rounded number with its array."""

    number: int
    tensor: Any
    rounded: Any
    array: Array

    @classmethod
    def of(cls, array: Array, count: int) -> Rows:
        """Of an array that has at least so many."""
        more = array[: rounded(count, len(array))]
        return cls(count, _tensor(array[:count]), _tensor(more), more)


def as_rows(value: Any) -> Rows:
    """All rows of an array, or the rows that are given."""
    return Rows.of(value, len(value)) if isinstance(value, np.ndarray) else value


class OpenVinoBuffer:
    """Host memory, with OpenVINO's tensors of its first rows made once."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.nbytes = array.nbytes
        self._rows: dict[int, Rows] = {}

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> OpenVinoBuffer:
        """New memory."""
        return cls(np.empty(shape, "uint16" if dtype == "bfloat16" else dtype))

    def rows(self, count: int) -> Rows:
        """See `Buffer.rows`."""
        found = self._rows.get(count)
        if found is None:
            found = self._rows[count] = Rows.of(self.array, count)
        return found

    def part(self, position: int) -> OpenVinoBuffer:
        """See `Buffer.part`."""
        return OpenVinoBuffer(self.array[position])
