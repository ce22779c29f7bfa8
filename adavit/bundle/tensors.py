"""A bundle's weights: a safetensors file, mapped into memory, every size and offset in its header checked."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.errors import BundleError, shown
from adavit.reading import parse_json

__all__ = ["DERIVED", "DTYPES", "Tensor", "TensorFile"]

LENGTH = 8
"""Bytes at the start: the length of the header, little-endian."""
DERIVED = "adavit.stem."
"""How the names of tensors begin that are made of the checkpoint's."""
MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
DTYPES = {"F32": "float32", "F16": "float16", "I8": "int8", "I64": "int64"}
"""Types of weights, as safetensors and as numpy name them."""


class Tensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
        dtype: numpy's name of its type.
        shape: its dimensions.
        offset: of its first byte in the file.
        bytes: its size.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file in memory.

    Attributes:
        data: the whole file, mapped where the system can.
        tensors: by name.
    """

    data: bytes | mmap.mmap
    tensors: Mapping[str, Tensor]

    @classmethod
    def parse(cls, data: bytes | mmap.mmap, path: str) -> TensorFile:
        """Reads the header of a file.

        Raises:
            BundleError: it is damaged, or tensors overlap or leave gaps.
        """
        try:
            return cls(data, _read_header(data))
        except (ValueError, TypeError) as error:
            raise BundleError(f"{path}: the weights' header is damaged ({error}); export again") from None

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor, read-only, in the file's own memory; raises BundleError where there is none of this name."""
        if (found := self.tensors.get(name)) is None:
            raise BundleError(f"the bundle has no weights {shown(name)}; export again")
        count = math.prod(found.shape)
        return np.frombuffer(self.data, np.dtype(found.dtype).newbyteorder("<"), count, found.offset).reshape(
            found.shape
        )

    def release(self) -> None:
        """Lets the system take back the memory of a mapped file; what is read again comes from its cache."""
        if isinstance(self.data, mmap.mmap) and hasattr(self.data, "madvise"):
            self.data.madvise(mmap.MADV_DONTNEED)


def _read_header(data: bytes | mmap.mmap) -> dict[str, Tensor]:
    length = int.from_bytes(data[:LENGTH], "little")
    if len(data) < LENGTH or not 2 <= length <= min(MAX_HEADER, len(data) - LENGTH):
        raise ValueError(f"its length is {length} of {len(data)} bytes")
    header = parse_json(data[LENGTH : LENGTH + length].decode())
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise ValueError("it is no object, or names too many tensors")
    start = LENGTH + length
    found = {name: _tensor(name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    at = start
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if tensor.offset != at:
            raise ValueError(f"{shown(name)} begins at {tensor.offset}, not at {at}")
        at += tensor.bytes
    if at != len(data):
        raise ValueError(f"the tensors end at {at}, the file at {len(data)}")
    return found


def _tensor(name: str, entry: Any, start: int) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        raise ValueError(f"{shown(name)} has the shape {shown(shape)} at {shown(offsets)}")
    if dtype not in DTYPES:
        raise ValueError(f"{shown(name)} has the type {shown(dtype)}")
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    size = math.prod(shape) * itemsize
    if not size or offsets[1] - offsets[0] != size:
        raise ValueError(f"{shown(name)} of {shown(shape)} takes {shown(size)} bytes, or none, at {shown(offsets)}")
    if (start + offsets[0]) % itemsize:
        raise ValueError(f"{shown(name)} lies across its memory's words")
    return Tensor(DTYPES[dtype], tuple(shape), start + offsets[0], size)
