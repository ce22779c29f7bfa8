"""Blocks whose graph gathers the weights of the kept heads, from those of all heads, where they lie in the file.

ONNX Runtime copies them on all threads, into memory that it uses again: half the time of cutting them before.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from adavit.architecture import Architecture
from adavit.bundle.head_weights import PROJECTIONS, Array
from adavit.bundle.onnx_format import Node, Value, Weight
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.bundle.onnx_write import new_node
from adavit.bundle.tensors import TensorFile
from adavit.errors import BundleError

__all__ = ["gather_heads"]

HEADS = "heads"
HANDED = ("qkv", "qkv_bias", "proj", "fc1", "fc2", HEADS)
"""What a block's graph is handed for some heads."""


def gather_heads(graph: OnnxGraph, arch: Architecture, tensors: TensorFile, block: int) -> OnnxGraph:
    """A block's graph with what gathers before it: it takes the numbers of the kept heads, and all heads' weights.

    The product with queries, keys and values, which lie apart in the file, becomes three.

    Args:
        graph: takes the weights of some heads.
        arch: the model's shapes.
        tensors: the weights of all.
        block: its position.

    Raises:
        BundleError: the graph has another product, or more than one, with the joined queries, keys and values.
    """
    return Gatherer(graph, arch, tensors, block).made()


class Gatherer:
    """Adds operators to a block's graph; see `gather_heads`."""

    def __init__(self, graph: OnnxGraph, arch: Architecture, tensors: TensorFile, block: int) -> None:
        self._arch, self._tensors, self._site = arch, tensors, f"blocks.{block}"
        self._graph, self._handed = graph, {value.name for value in graph.inputs if value.name in HANDED}
        self._adapts = arch.adapts_heads(block)
        self._first: list[Node] = []
        self._weights = dict(graph.weights)

    def made(self) -> OnnxGraph:
        """The graph."""
        nodes = list(self._graph.nodes)
        if "qkv" in self._handed:
            at = self._place_of_projections()
            nodes[at : at + 1] = self._projections(nodes[at])
            self._columns("proj", "attn.proj", self._arch.width)
        if "fc1" in self._handed:
            if self._adapts:
                self._columns("fc1", "mlp.fc1", self._arch.hidden)
            else:
                self._add("Identity", "fc1", self._matrix("mlp.fc1", (self._arch.hidden, self._arch.width)))
            self._add("Identity", "fc2", self._matrix("mlp.fc2", (self._arch.width, self._arch.hidden)))
        left = [value for value in self._graph.inputs if value.name not in self._handed]
        if any(HEADS in node.inputs for node in (*self._first, *nodes)):
            left.append(Value(HEADS, "int64", ("h",)))
        return replace(self._graph, nodes=(*self._first, *nodes), weights=self._weights, inputs=tuple(left))

    def _place_of_projections(self) -> int:
        """Where the product with the joined queries, keys and values is, the only thing that reads them."""
        found = [place for place, node in enumerate(self._graph.nodes) if "qkv" in node.inputs]
        if len(found) == 1:
            node = self._graph.nodes[found[0]]
            if node.op == "Gemm" and node.inputs[1:] == ("qkv",) and node.attributes == {"transB": 1}:
                return found[0]
        raise BundleError(f"graph {self._graph.name} multiplies by qkv in another way than exports do; export again")

    def _projections(self, joined: Node) -> list[Node]:
        """Products with queries, keys and values, joined behind; biases are added there."""
        arch, (made,) = self._arch, joined.outputs
        rows, products, parts = [arch.heads, arch.head_width, arch.width], [], []
        for part in PROJECTIONS:
            weight = self._matrix(f"attn.{part}", (arch.width, arch.width))
            by_head = self._add("Reshape", f"{weight}.rows", weight, self._shape(*rows))
            kept = self._add("Gather", f"{weight}.kept", by_head, HEADS, axis=0)
            flat = self._add("Flatten", f"{weight}.flat", kept, axis=2)
            parts.append(f"gathered.{part}")
            products.append(new_node("Gemm", parts[-1], [joined.inputs[0], flat], [parts[-1]], transB=1))
        stored = self._tensors.tensors[f"{self._site}.attn.query.weight"].dtype
        dtype = "float32" if stored == "int8" else stored
        scale = self._constant(f"gathered.scale.{dtype}", np.asarray(arch.head_width**-0.5, dtype))
        products.append(new_node("Mul", "gathered.scaled", [parts[0], scale], ["gathered.scaled"]))
        products.append(new_node("Concat", joined.name, ["gathered.scaled", *parts[1:]], [made], axis=1))
        if "qkv_bias" in self._handed:
            self._bias(scale)
        return products

    def _bias(self, scale: str) -> None:
        """Biases of queries, which are scaled, none of keys, and those of values."""
        query, value = (self._kept_bias(part) for part in ("query", "value"))
        scaled = self._add("Mul", "gathered.query_bias", query, scale)
        none = self._add("Sub", "gathered.key_bias", query, query)
        self._add("Concat", "qkv_bias", scaled, none, value, axis=0)

    def _kept_bias(self, part: str) -> str:
        name = self._input(f"attn.{part}.bias", (self._arch.width,))
        by_head = self._add("Reshape", f"{name}.rows", name, self._shape(1, self._arch.heads, self._arch.head_width))
        kept = self._add("Gather", f"{name}.kept", by_head, HEADS, axis=1)
        flat = self._add("Flatten", f"{name}.flat", kept, axis=1)
        return self._add("Squeeze", f"{name}.vector", flat, self._constant("gathered.axis", np.zeros(1, np.int64)))

    def _columns(self, name: str, tensor: str, out: int) -> None:
        """Input channels of the kept heads."""
        weight = self._matrix(tensor, (out, self._arch.width))
        shape = self._shape(out, self._arch.heads, self._arch.head_width)
        by_head = self._add("Reshape", f"{weight}.columns", weight, shape)
        kept = self._add("Gather", f"{weight}.kept", by_head, HEADS, axis=1)
        self._add("Flatten", name, kept, axis=1)

    def _matrix(self, tensor: str, shape: tuple[int, int]) -> str:
        """All of a linear layer's weights; int8 weights dequantised."""
        name = self._input(f"{tensor}.weight", shape)
        if self._weights[name].dtype != "int8":
            return name
        # ONNX Runtime 1.23 refuses products in int8 without zero points.
        scale, zero = (self._input(f"{tensor}.weight.{kind}", shape[:1]) for kind in ("scale", "zero"))
        return self._add("DequantizeLinear", f"{name}.float", name, scale, zero, axis=0)

    def _input(self, tensor: str, shape: tuple[int, ...]) -> str:
        """A tensor of the block as an input."""
        name, source = f"gathered.{tensor}", f"{self._site}.{tensor}"
        self._weights[name] = Weight(self._tensors.tensors[source].dtype, shape, source)
        return name

    def _shape(self, *sizes: int) -> str:
        return self._constant("gathered.shape." + "_".join(map(str, sizes)), np.array(sizes, np.int64))

    def _constant(self, name: str, value: Array) -> str:
        self._weights[name] = Weight(value.dtype.name, value.shape, None, value.tobytes())
        return name

    def _add(self, op: str, name: str, *given: str, axis: int | None = None) -> str:
        """Adds an operator before the graph's own."""
        attributes = {} if axis is None else {"axis": axis}
        self._first.append(new_node(op, name, given, [name], "", **attributes))
        return name
