"""Reads the weights in an ONNX model's bytes, and makes inputs of it weights, which backends prepare once.

The runtime has no onnx, and needs none: a model is a protobuf message, which is a sequence of numbered fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.errors import BundleError

__all__ = ["weights_of", "with_fixed_inputs"]

MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT = 1, 5, 11
NODE_NAME, NODE_ATTRIBUTE = 3, 5
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_INTS, ATTRIBUTE_TYPE = 1, 3, 8, 20
VALUE_NAME = 1
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_DATA = 1, 2, 8, 9
"""Numbers of fields, from onnx.proto."""
TYPES = {"float32": 1, "int64": 7}
"""ONNX's numbers of element types."""
INT, INTS = 2, 7
"""ONNX's numbers of attributes' types."""
VARINT, BYTES = 0, 2
"""Wire types."""
FIXED = {1: 8, 5: 4}
"""Bytes of the wire types that have a fixed size."""


def weights_of(model: bytes) -> dict[str, npt.NDArray[np.float32]]:
    """The float32 weights of a model by name, in its own memory.

    Raises:
        BundleError: it is no model, or a weight has another size than its shape says.
    """
    graphs = [content for number, _, content in _fields(model) if number == MODEL_GRAPH]
    tensors = (content for graph in graphs for number, _, content in _fields(graph) if number == GRAPH_INITIALIZER)
    found = (_weight(tensor) for tensor in tensors)
    return {name: value for name, value in found if value is not None}


def _weight(tensor: bytes) -> tuple[str, npt.NDArray[np.float32] | None]:
    """The name and the values of a TensorProto; None where these are not float32."""
    fields = list(_fields(tensor))
    content = {number: value for number, _, value in fields}
    name = content.get(TENSOR_NAME, b"").decode(errors="replace")
    if _varint(content.get(TENSOR_TYPE, b"\0"), 0)[0] != TYPES["float32"]:
        return name, None
    shape = [size for number, _, value in fields if number == TENSOR_DIMS for size in _numbers(value)]
    data = content.get(TENSOR_DATA, b"")
    if len(data) != 4 * math.prod(shape):
        raise BundleError(f"the weight {name} is not of the shape {shape}; export again")
    return name, np.frombuffer(data, "<f4").reshape(shape)


def _numbers(content: bytes) -> Iterator[int]:
    """Every number of a field of one or more of them."""
    at = 0
    while at < len(content):
        value, at = _varint(content, at)
        yield value


def with_fixed_inputs(
    model: bytes,
    values: Mapping[str, npt.NDArray[Any]],
    attributes: Mapping[str, Mapping[str, int | Sequence[int]]] | None = None,
) -> bytes:
    """The model without the inputs of these names, which are weights of these values instead.

    Args:
        model: a serialised ONNX model.
        values: by the name of the input, float32 or int64.
        attributes: what nodes lack, by the name of the node and of the attribute.

    Raises:
        BundleError: the model has no such input, or is no model.
    """
    fields, found = [], set()
    for number, field, content in _fields(model):
        if number != MODEL_GRAPH:
            fields.append(field)
            continue
        graph = []
        for part, inner, value in _fields(content):
            name = _name(value, VALUE_NAME) if part == GRAPH_INPUT else None
            if name in values:
                found.add(name)
            elif attributes and part == GRAPH_NODE and (lacking := attributes.get(_name(value, NODE_NAME))):
                added = (_bytes_field(NODE_ATTRIBUTE, _attribute(*item)) for item in lacking.items())
                graph.append(_bytes_field(GRAPH_NODE, b"".join([value, *added])))
            else:
                graph.append(inner)
        graph += [_bytes_field(GRAPH_INITIALIZER, _tensor(name, value)) for name, value in values.items()]
        fields.append(_bytes_field(MODEL_GRAPH, b"".join(graph)))
    if missing := set(values) - found:
        raise BundleError(f"an engine has no input {', '.join(sorted(missing))}; export again")
    return b"".join(fields)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Every field of a message: its number, all of its bytes, and its content where it has a length."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        kind, content = tag & 7, at
        if kind == VARINT:
            _, at = _varint(message, at)
        elif kind == BYTES:
            length, content = _varint(message, at)
            at = content + length
        elif kind in FIXED:
            at += FIXED[kind]
        else:
            raise BundleError("an engine is no ONNX model; export again")
        if at > len(message):
            raise BundleError("an engine ends in the middle of a field; export again")
        yield tag >> 3, message[start:at], message[content:at]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a position, seven bits a byte, and the position behind it."""
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise BundleError("an engine holds a damaged number; export again")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _name(value: bytes, field: int) -> str:
    """The name in a message, which has it in a field of this number."""
    return next((content.decode(errors="replace") for number, _, content in _fields(value) if number == field), "")


def _attribute(name: str, value: int | Sequence[int]) -> bytes:
    """An AttributeProto."""
    if isinstance(value, int):
        numbers, kind = _number_field(ATTRIBUTE_INT, value), INT
    else:
        numbers, kind = b"".join(_number_field(ATTRIBUTE_INTS, number) for number in value), INTS
    return _bytes_field(ATTRIBUTE_NAME, name.encode()) + numbers + _number_field(ATTRIBUTE_TYPE, kind)


def _tensor(name: str, value: npt.NDArray[Any]) -> bytes:
    """A TensorProto."""
    dims = b"".join(_number_field(TENSOR_DIMS, size) for size in value.shape)
    kind = _number_field(TENSOR_TYPE, TYPES[value.dtype.name])
    data = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
    return dims + kind + _bytes_field(TENSOR_NAME, name.encode()) + _bytes_field(TENSOR_DATA, data)


def _number_field(number: int, value: int) -> bytes:
    return _encoded(number << 3 | VARINT) + _encoded(value)


def _bytes_field(number: int, content: bytes) -> bytes:
    return _encoded(number << 3 | BYTES) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    """A number as a varint."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
