"""A bundle's ONNX graphs, read without onnx, checked, and written with weights as constants or as inputs.

A graph's file holds no weights: they are references into the weights' file beside it. Whoever makes a bundle chooses
what its files say, hashes included. So a graph may hold nothing but the operators that export writes, without
subgraphs, functions or strings, and each reference has to be exactly a tensor of the weights' header. What a backend
is given is written anew from what was read here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from adavit.bundle.head_weights import Quantised
from adavit.bundle.protobuf import BYTES, FIXED32, VARINT, Field, Fields, bytes_field, number_field, numbers, read
from adavit.bundle.shapes import MOST_DIMENSIONS, RULES, Known, Limits, infer
from adavit.bundle.tensors import TensorFile
from adavit.errors import BundleError, shown

__all__ = ["OPERATORS", "GraphReader", "Node", "OnnxGraph", "Value", "Weight", "new_node", "values_of"]

Array = npt.NDArray[Any]
T = TypeVar("T")

_ATTRIBUTES = {
    "Cast": "to",
    "Concat": "axis",
    "Conv": "kernel_shape strides pads",
    "DequantizeLinear": "axis",
    "Gather": "axis",
    "Gemm": "transB",
    "LayerNormalization": "axis epsilon",
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

TYPES = {"float32": 1, "int8": 3, "int64": 7, "bool": 9, "float16": 10}
"""ONNX's numbers of element types."""
_TYPE_NAMES = {number: name for name, number in TYPES.items()}

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
IR_VERSION = 10
PRODUCER = b"adavit"


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


@dataclass(frozen=True)
class OnnxGraph:
    """A graph as its file holds it.

    Attributes:
        name: the graph's own.
        opset: version of the standard operators.
        nodes: in the order they run.
        weights: constants by name.
        inputs, outputs: in order.
    """

    name: str
    opset: int
    nodes: tuple[Node, ...]
    weights: Mapping[str, Weight]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def check(self, sizes: Mapping[str, int], rows: Mapping[str, int], limits: Limits) -> None:
        """Checks that every operator fits its inputs, and that the outputs are of the shapes that are declared.

        Args:
            sizes: of the dimensions that vary, by name.
            rows: below what the numbers are that an input holds, by the input's name.
            limits: what the graph may take.

        Raises:
            ValueError: it is not so.
        """

        def known(value: Value) -> Known:
            shape = tuple(sizes[size] if isinstance(size, str) else size for size in value.shape)
            return Known(value.dtype, shape, None, rows.get(value.name))

        made = {value.name: known(value) for value in self.inputs}
        made |= {name: _constant_value(weight) for name, weight in self.weights.items()}
        made = infer(self.nodes, made, limits)
        for value in self.outputs:
            if made[value.name][:2] != known(value)[:2]:
                raise ValueError(f"its output {shown(value.name)} is {shown(made[value.name].shape)}")

    @property
    def form(self) -> Hashable:
        """What `check` looks at: graphs of one form all pass it, or none does."""
        weights = ((name, *weight[:2], weight.tensor is None, weight.data) for name, weight in self.weights.items())
        return tuple(node.data for node in self.nodes), tuple(weights), self.inputs, self.outputs

    def arrays(self, tensors: TensorFile) -> dict[str, Array]:
        """The weights that lie in the weights' file, by their names in the graph."""
        return {name: tensors.array(weight.tensor) for name, weight in self.weights.items() if weight.tensor}

    def _names(self) -> set[str]:
        """Of all values."""
        made = {name for node in self.nodes for name in node.outputs}
        return made | set(self.weights) | {value.name for value in self.inputs}

    def model(
        self,
        constants: Mapping[str, Array | Quantised],
        external: bool = False,
        nodes: Sequence[Node] | None = None,
        added: Mapping[str, Array] | None = None,
        domains: Mapping[str, int] | None = None,
    ) -> bytes:
        """A complete ONNX model: weights and inputs that `constants` names are constants, other weights are inputs.

        Args:
            constants: by name; int8 weights [out, in] are dequantised by an operator.
            external: leave the constants' values out, for a backend that is handed them beside the model: those of
                `values_of(constants)`.
            nodes: in the place of the graph's own.
            added: further constants that these nodes read, inside the model.
            domains: versions of further operator sets, by domain.

        Raises:
            BundleError: the graph has no such weight or input.
        """
        if unknown := set(constants) - set(self.weights) - {value.name for value in self.inputs}:
            raise BundleError(f"graph {self.name} takes no {', '.join(sorted(unknown))}; export again")
        given = [value for value in self.inputs if value.name not in constants]
        given += [
            Value(name, weight.dtype, weight.shape)
            for name, weight in self.weights.items()
            if weight.tensor and name not in constants
        ]
        quantised = [name for name, value in constants.items() if isinstance(value, Quantised)]
        if not {part for name in quantised for part in codes_of(name)}.isdisjoint(self._names()):
            raise BundleError(f"graph {self.name} uses names of int8 weights; export again")
        first = [new_node("DequantizeLinear", name, codes_of(name), [name], axis=0) for name in quantised]
        inside = ((name, weight) for name, weight in self.weights.items() if weight.tensor is None)
        graph = [bytes_field(1, node.data) for node in (*first, *(self.nodes if nodes is None else nodes))]
        graph.append(bytes_field(2, self.name.encode()))
        graph += [bytes_field(5, _tensor(name, weight.dtype, weight.shape, weight.data)) for name, weight in inside]
        graph += [bytes_field(5, _constant(name, array, external)) for name, array in values_of(constants).items()]
        graph += [bytes_field(5, _constant(name, array, False)) for name, array in (added or {}).items()]
        graph += [bytes_field(11, _value(value)) for value in given]
        graph += [bytes_field(12, _value(value)) for value in self.outputs]
        versions = {"": self.opset, **(domains or {})}
        opsets = (bytes_field(1, name.encode()) + number_field(2, version) for name, version in versions.items())
        return b"".join(
            [
                number_field(1, IR_VERSION),
                bytes_field(2, PRODUCER),
                bytes_field(7, b"".join(graph)),
                *(bytes_field(8, opset) for opset in opsets),
            ]
        )


def _constant_value(weight: Weight) -> Known:
    """What is known of a constant; of whole numbers inside the graph, all."""
    if weight.dtype != "int64" or weight.tensor:
        return Known(weight.dtype, weight.shape)
    values = tuple(np.frombuffer(weight.data, "<i8").tolist())
    below = max(values) + 1 if values and min(values) >= 0 else None
    return Known("int64", weight.shape, values, below)


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
        dtype = _TYPE_NAMES.get(tensor.value(2))
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
    dtype = _TYPE_NAMES.get(kind.value(1))
    if dtype is None or len(dims) > MOST_DIMENSIONS:
        raise ValueError(f"{shown(value.text(1))} is of an unknown type")
    return Value(value.text(1), dtype, tuple(dim.text(2) if 2 in dim else dim.value(1) for dim in dims))


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


def _tensor(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    dims = b"".join(number_field(1, size) for size in shape)
    return dims + number_field(2, TYPES[dtype]) + bytes_field(8, name.encode()) + bytes_field(9, data)


def _constant(name: str, array: Array, external: bool) -> bytes:
    if not external:
        return _tensor(name, array.dtype.name, array.shape, np.ascontiguousarray(array).tobytes())
    place = bytes_field(1, b"location") + bytes_field(2, b"handed over")
    dims = b"".join(number_field(1, size) for size in array.shape)
    head = dims + number_field(2, TYPES[array.dtype.name]) + bytes_field(8, name.encode())
    return head + bytes_field(13, place) + number_field(14, EXTERNAL)


def _value(value: Value) -> bytes:
    dims = (bytes_field(2, size.encode()) if isinstance(size, str) else number_field(1, size) for size in value.shape)
    shape = b"".join(bytes_field(1, dim) for dim in dims)
    kind = number_field(1, TYPES[value.dtype]) + bytes_field(2, shape)
    return bytes_field(1, value.name.encode()) + bytes_field(2, bytes_field(1, kind))
