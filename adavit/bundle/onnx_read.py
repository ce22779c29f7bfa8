"""Reads a bundle's ONNX graphs without onnx, and refuses what no export writes.

Whoever makes a bundle chooses what its files say, hashes included. So a graph may hold nothing but the operators that
export writes, without subgraphs, functions or strings. Each reference has to be exactly a tensor of the weights'
header.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from adavit.bundle.known import MOST_DIMENSIONS
from adavit.bundle.onnx_format import (
    ATTRIBUTE,
    ATTRIBUTE_TYPES,
    DIMENSION,
    ENTRY,
    EXTERNAL,
    FLOAT,
    GRAPH,
    INTEGERS,
    MODEL,
    NODE,
    OPSET,
    SHAPE,
    TENSOR,
    TENSOR_TYPE,
    TYPE,
    TYPE_NAMES,
    VALUE,
    VECTORS,
    Node,
    Value,
    Weight,
)
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.bundle.operators import RULES
from adavit.bundle.protobuf import Fields, numbers, read
from adavit.bundle.tensors import TensorFile
from adavit.errors import BundleError, shown

__all__ = ["OPERATORS", "GraphReader"]

T = TypeVar("T")

_ATTRIBUTES = {
    "Cast": "to",
    "Concat": "axis",
    "Conv": "kernel_shape strides pads",
    "CumSum": "exclusive",
    "DequantizeLinear": "axis",
    "Gather": "axis",
    "Gemm": "transB",
    "LayerNormalization": "axis epsilon",
    "ReduceMax": "keepdims",
    "ReduceSum": "keepdims",
    "Shape": "start end",
    "Softmax": "axis",
    "Split": "axis",
    "Transpose": "perm",
}
OPERATORS = {op: frozenset(_ATTRIBUTES.get(op, "").split()) for op in sorted(RULES)}
"""The standard operators that exports write, and their attributes."""

MOST_INLINE = 4096
"""Bytes of a constant inside a graph, such as a shape; larger ones are weights."""
MOST_NODES = 100_000


class GraphReader:
    """Reads graphs whose references are into one file of weights.

    Args:
        tensors: the weights that they may refer to.
        weights_file: the name of the weights' file, the only one that they may name.
        opset: the version of the standard operators that they have to have.
    """

    def __init__(self, tensors: TensorFile, weights_file: str, opset: int) -> None:
        self._tensors, self._file, self._opset = tensors, weights_file, opset
        self._at = {tensor.offset: name for name, tensor in tensors.tensors.items()}
        self._nodes: dict[bytes, Node] = {}
        self._values: dict[bytes, Value] = {}

    def read(self, data: bytes, path: str) -> OnnxGraph:
        """Reads a graph.

        Args:
            data: the file's bytes.
            path: of the file, for messages.

        Raises:
            BundleError: it is damaged, or holds what no export writes, or refers to anything but a tensor.
        """
        try:
            return self._graph(data)
        except (ValueError, LookupError) as error:  # ValueError also for what is no UTF-8
            raise BundleError(f"{path}: is not a graph that adavit exports: {error}; do not use this bundle") from None

    def _graph(self, data: bytes) -> OnnxGraph:
        model = read(data, MODEL)
        opsets = [read(content, OPSET) for content in model.get(8, [])]
        if len(opsets) != 1 or opsets[0].text(1) or opsets[0].value(2) != self._opset or 7 not in model:
            raise ValueError(f"it has other operator sets than version {self._opset} of the standard one, or no graph")
        graph = read(model[7][0], GRAPH)
        weights = dict(self._weight(read(content, TENSOR)) for content in graph.get(5, []))
        if len(weights) != len(graph.get(5, [])):
            raise ValueError("two constants have one name")
        if len(graph.get(1, [])) > MOST_NODES:
            raise ValueError("it has too many operators")
        nodes = tuple(_once(self._nodes, content, _node) for content in graph.get(1, []))
        inputs, outputs = (
            tuple(_once(self._values, content, _read_value) for content in graph.get(number, [])) for number in (11, 12)
        )
        _check_names(nodes, weights, inputs, outputs)
        return OnnxGraph(graph.text(2), opsets[0].value(2), nodes, weights, inputs, outputs)

    def _weight(self, tensor: Fields) -> tuple[str, Weight]:
        name, shape = tensor.text(8), tuple(numbers(tensor.get(1, [])))
        dtype = TYPE_NAMES.get(tensor.value(2))
        if dtype is None or len(shape) > MOST_DIMENSIONS or not all(0 < size < 1 << 31 for size in shape):
            raise ValueError(f"the constant {shown(name)} has an unknown type or the shape {shown(shape)}")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if tensor.value(14) != EXTERNAL:
            data = tensor[9][0] if 9 in tensor else b""
            if len(data) != size or size > MOST_INLINE or 13 in tensor:
                raise ValueError(f"the constant {shown(name)} has {len(data)} bytes for a size of {size}")
            return name, Weight(dtype, shape, None, data)
        entries = [read(content, ENTRY) for content in tensor.get(13, [])]
        place = {entry.text(1): entry.text(2) for entry in entries}
        if 9 in tensor or len(place) != len(entries) or set(place) != {"location", "offset", "length"}:
            raise ValueError(f"the reference of {shown(name)} is no location, offset and length")
        if place["location"] != self._file or not all(place[key].isdecimal() for key in ("offset", "length")):
            raise ValueError(f"the weight {shown(name)} lies in {shown(place['location'])}, not in {self._file}")
        found = self._at.get(int(place["offset"][:20]))
        known = self._tensors.tensors.get(found) if found else None
        if found is None or known is None or (known.dtype, known.shape) != (dtype, shape):
            raise ValueError(f"the weight {shown(name)} is no tensor of {self._file}")
        if place["length"] != str(known.bytes) or place["offset"] != str(known.offset):
            raise ValueError(f"the weight {shown(name)} has another size than the tensor {shown(found)}")
        return name, Weight(dtype, shape, found)


def _once(done: dict[bytes, T], data: bytes, read_it: Callable[[bytes], T]) -> T:
    """What is read of bytes, which the graphs of all blocks share."""
    found = done.get(data)
    if found is None:
        found = done[data] = read_it(data)
    return found


def _node(data: bytes) -> Node:
    fields = read(data, NODE)
    op = fields.text(4)
    if op not in OPERATORS:
        raise ValueError(f"it has an operator {shown(op)}")
    attributes = dict(_read_attribute(content, op) for content in fields.get(5, []))
    if len(attributes) != len(fields.get(5, [])):
        raise ValueError(f"its operator {op} has an attribute twice")
    inputs, outputs = (tuple(content.decode() for content in fields.get(number, [])) for number in (1, 2))
    return Node(op, fields.text(3), inputs, outputs, data, attributes)


def _read_attribute(data: bytes, op: str) -> tuple[str, Any]:
    """An attribute's name, and its float, whole number or tuple of these."""
    attribute = read(data, ATTRIBUTE)
    name, holds = attribute.text(1), ATTRIBUTE_TYPES.get(attribute.value(20))
    if name not in OPERATORS[op] or holds is None or not set(attribute) <= {1, 20, holds}:
        raise ValueError(f"its operator {op} has an attribute {shown(name)}, or one of another type")
    if (holds == FLOAT) != (name == "epsilon") or (holds == INTEGERS) != (name in VECTORS):
        raise ValueError(f"its operator {op} has an attribute {shown(name)} of another type")
    content = attribute.get(holds, [])
    if holds == FLOAT:
        return name, float(np.frombuffer(content[0], "<f4")[0]) if content else 0.0
    values = tuple(_signed(value) for value in numbers(content))
    if holds == INTEGERS:
        return name, values
    return name, values[0] if values else 0


def _signed(value: int) -> int:
    """A number of 64 bits that may be negative."""
    return value - (1 << 64) if value >> 63 else value


def _check_names(
    nodes: tuple[Node, ...], weights: Mapping[str, Weight], inputs: tuple[Value, ...], outputs: tuple[Value, ...]
) -> None:
    """Raises ValueError unless every value is made once, before it is read."""
    there = set(weights)
    made = [((), tuple(value.name for value in inputs)), *((node.inputs, node.outputs) for node in nodes)]
    for reads, makes in made:
        if not there.issuperset(reads):
            raise ValueError(f"it reads {shown(sorted(set(reads) - there))}, which nothing makes before")
        if len(set(makes)) != len(makes) or not there.isdisjoint(makes) or "" in makes:
            raise ValueError(f"it makes one of {shown(list(makes))} twice, or without a name")
        there.update(makes)
    if len({value.name for value in outputs}) != len(outputs):
        raise ValueError("two outputs have one name")
    if missing := {value.name for value in outputs} - there:
        raise ValueError(f"nothing makes its output {shown(min(missing))}")


def _read_value(data: bytes) -> Value:
    value = read(data, VALUE)
    kind = read(read(value[2][0], TYPE)[1][0], TENSOR_TYPE) if 2 in value else Fields()
    dims = [read(content, DIMENSION) for content in read(kind[2][0], SHAPE).get(1, [])] if 2 in kind else []
    dtype = TYPE_NAMES.get(kind.value(1))
    if dtype is None or len(dims) > MOST_DIMENSIONS:
        raise ValueError(f"{shown(value.text(1))} is of an unknown type")
    return Value(value.text(1), dtype, tuple(dim.text(2) if 2 in dim else dim.value(1) for dim in dims))
