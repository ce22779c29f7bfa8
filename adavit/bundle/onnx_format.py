"""The parts of an ONNX graph, and the numbers that stand for them in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from adavit.bundle.protobuf import BYTES, FIXED32, VARINT, Field

__all__ = [
    "ATTRIBUTE",
    "ATTRIBUTE_TYPES",
    "DIMENSION",
    "ENTRY",
    "EXTERNAL",
    "FLOAT",
    "GRAPH",
    "INTEGERS",
    "IR_VERSION",
    "MODEL",
    "NODE",
    "OPSET",
    "PRODUCER",
    "SHAPE",
    "TENSOR",
    "TENSOR_TYPE",
    "TYPE",
    "TYPES",
    "TYPE_NAMES",
    "VALUE",
    "VECTORS",
    "Node",
    "Value",
    "Weight",
]

IR_VERSION = 10
PRODUCER = b"adavit"
TYPES = {"float32": 1, "int8": 3, "int64": 7, "bool": 9, "float16": 10}
"""ONNX's numbers of element types."""
TYPE_NAMES = {number: name for name, number in TYPES.items()}

_TEXT, _NUMBER, _MANY, _NUMBERS = Field(BYTES), Field(VARINT), Field(BYTES, True), Field(VARINT, True)
MODEL = {1: _NUMBER, 2: _TEXT, 7: _TEXT, 8: _MANY}
OPSET = {1: _TEXT, 2: _NUMBER}
GRAPH = {1: _MANY, 2: _TEXT, 5: _MANY, 11: _MANY, 12: _MANY}
NODE = {1: _MANY, 2: _MANY, 3: _TEXT, 4: _TEXT, 5: _MANY}
ATTRIBUTE = {1: _TEXT, 2: Field(FIXED32), 3: _NUMBER, 8: _NUMBERS, 20: _NUMBER}
TENSOR = {1: _NUMBERS, 2: _NUMBER, 8: _TEXT, 9: _TEXT, 13: _MANY, 14: _NUMBER}
ENTRY = {1: _TEXT, 2: _TEXT}
VALUE, TYPE, TENSOR_TYPE = {1: _TEXT, 2: _TEXT}, {1: _TEXT}, {1: _NUMBER, 2: _TEXT}
SHAPE, DIMENSION = {1: _MANY}, {1: _NUMBER, 2: _TEXT}
"""Numbers of the fields that exports write, from onnx.proto."""
EXTERNAL = 1
"""ONNX's number for data in another file."""
FLOAT, INTEGER, INTEGERS = 2, 3, 8
"""The fields of an attribute that holds a float, a whole number, or several."""
ATTRIBUTE_TYPES = {1: FLOAT, 2: INTEGER, 7: INTEGERS}
"""These, by ONNX's number of the attribute's type."""
VECTORS = ("kernel_shape", "strides", "pads", "perm")
"""Attributes that hold several numbers; all others but epsilon hold one."""


class Value(NamedTuple):
    """An input or output; a dimension is a size, or a name where it varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Weight(NamedTuple):
    """A constant of a graph.

    Attributes:
        dtype: numpy's name of its type.
        shape: its dimensions.
        tensor: its name in the weights' file, or None where it is inside the graph.
        data: its bytes, where it is inside.
    """

    dtype: str
    shape: tuple[int, ...]
    tensor: str | None
    data: bytes = b""


class Node(NamedTuple):
    """An operator.

    Attributes:
        op: its type.
        name: its own.
        inputs, outputs: names of values.
        data: the encoded node.
        attributes: a float, a whole number or a tuple of these, by name.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    data: bytes
    attributes: Mapping[str, Any]
