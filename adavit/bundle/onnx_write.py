"""Writes the parts of an ONNX graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.head_weights import Quantised
from adavit.bundle.onnx_format import EXTERNAL, TYPES, Node, Value
from adavit.bundle.protobuf import FIXED32, bytes_field, number_field

__all__ = ["codes_of", "constant_field", "new_node", "tensor_field", "value_field", "values_of"]

Array = npt.NDArray[Any]


def values_of(constants: Mapping[str, Array | Quantised]) -> dict[str, Array]:
    """The constants of a model by name: int8 weights are codes, scales and zero points."""
    found: dict[str, Array] = {}
    for name, value in constants.items():
        if isinstance(value, Quantised):
            parts = value.codes, value.scale, np.zeros(len(value.scale), np.int8)
            found |= dict(zip(codes_of(name), parts, strict=True))
        else:
            found[name] = value
    return found


def codes_of(name: str) -> list[str]:
    """The names of the codes, scales and zero points of int8 weights."""
    return [f"{name}.{part}" for part in ("codes", "scale", "zero")]


def new_node(
    op: str, name: str, inputs: Collection[str], outputs: Collection[str], domain: str = "", **ints: Any
) -> Node:
    """A new node, its attributes floats, integers or lists of integers."""
    data = [bytes_field(1, value.encode()) for value in inputs]
    data += [bytes_field(2, value.encode()) for value in outputs]
    data += [bytes_field(3, name.encode()), bytes_field(4, op.encode())]
    data += [bytes_field(5, _attribute(key, value)) for key, value in ints.items()]
    if domain:
        data.append(bytes_field(7, domain.encode()))
    return Node(op, name, tuple(inputs), tuple(outputs), b"".join(data), ints)


def _attribute(name: str, value: float | list[int]) -> bytes:
    if isinstance(value, float):
        encoded, kind = bytes([2 << 3 | FIXED32]) + np.float32(value).tobytes(), 1
    elif isinstance(value, int):
        encoded, kind = number_field(3, value % (1 << 64)), 2
    else:
        encoded, kind = b"".join(number_field(8, number % (1 << 64)) for number in value), 7
    return bytes_field(1, name.encode()) + encoded + number_field(20, kind)


def tensor_field(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    """The field of a constant whose bytes are inside the graph."""
    dims = b"".join(number_field(1, size) for size in shape)
    return dims + number_field(2, TYPES[dtype]) + bytes_field(8, name.encode()) + bytes_field(9, data)


def constant_field(name: str, array: Array, external: bool) -> bytes:
    """The field of a constant; `external` leaves its values out."""
    if not external:
        return tensor_field(name, array.dtype.name, array.shape, np.ascontiguousarray(array).tobytes())
    place = bytes_field(1, b"location") + bytes_field(2, b"handed over")
    dims = b"".join(number_field(1, size) for size in array.shape)
    head = dims + number_field(2, TYPES[array.dtype.name]) + bytes_field(8, name.encode())
    return head + bytes_field(13, place) + number_field(14, EXTERNAL)


def value_field(value: Value) -> bytes:
    """The field of an input or output."""
    dims = (bytes_field(2, size.encode()) if isinstance(size, str) else number_field(1, size) for size in value.shape)
    shape = b"".join(bytes_field(1, dim) for dim in dims)
    kind = number_field(1, TYPES[value.dtype]) + bytes_field(2, shape)
    return bytes_field(1, value.name.encode()) + bytes_field(2, bytes_field(1, kind))
