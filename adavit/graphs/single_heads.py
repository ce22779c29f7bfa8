"""The weights of a block's heads in a single file, and attention with them: constant, or gathered for what is kept.

The layouts of what is gathered have the heads first, so that a head's weights are one piece of memory: qkv [H, D, 3d],
proj [H, d, D] and fc1 [H, d, F].
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from adavit.architecture import Architecture
from adavit.bundle.head_weights import Array, Arrays, Quantised, head_weights, quantised_head_weights
from adavit.bundle.keys import BOTH, BlockKey
from adavit.graphs.nested import NestedBuilder
from adavit.graphs.precision import Precision

__all__ = ["MICROSOFT", "HeadSet", "Heads", "every_head", "places_of"]

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

HeadSet = tuple[int, ...]
INT8 = Precision("int8")
TENSORS = {"qkv": "attn.query", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""A tensor of each kind of linear layer."""


def every_head(arch: Architecture) -> HeadSet:
    """The set of all heads."""
    return tuple(range(arch.heads))


def places_of(graph: NestedBuilder, mask: str) -> str:
    """The numbers of what a mask [M] keeps, int64 [K]."""
    return graph.op("Reshape", graph.op("NonZero", mask), graph.ints(-1))


class Heads:
    """The heads of a block.

    Args:
        arch: the model's shapes.
        block: its position.
    """

    def __init__(self, arch: Architecture, block: int) -> None:
        self.arch = arch
        self.block = block

    def linear(self, graph: NestedBuilder, x: str, kind: str, which: HeadSet, bias: str = "") -> str:
        """A linear layer with the constant weights of a set of heads, in their precision.

        Args:
            graph: where to add.
            x: what it reads, [K, in].
            kind: "qkv", "proj", "fc1" or "fc2".
            which: the heads.
            bias: the value that holds its bias, if it has one.
        """
        name = self._name(kind, which)
        if graph.tensors.tensors[f"blocks.{self.block}.{TENSORS[kind]}.weight"].dtype != "int8":
            weight = graph.matrix(name, lambda: self._weights(graph, which)[kind])
            return graph.op("Gemm", x, weight, *([bias] if bias else []), transB=1)
        codes = graph.matrix(name, lambda: self._codes(graph, kind, which).codes)
        scale = graph.matrix(f"{name}.scale", lambda: self._codes(graph, kind, which).scale)
        zero = graph.matrix(f"{name}.zero", lambda: np.zeros(self._codes(graph, kind, which).scale.shape, np.int8))
        read = INT8.enter(graph, x, f"blocks.{self.block}.{kind}")
        # ONNX Runtime multiplies in int8 where nothing but the product is between the two.
        y = graph.op("Gemm", read, graph.op("DequantizeLinear", codes, scale, zero, axis=0), transB=1)
        return graph.op("Add", y, bias) if bias else y

    def proj_gathered(self, graph: NestedBuilder, places: str) -> str:
        """The output projection of kept heads: int64 [h] -> [c, D]."""
        return self._gathered(graph, "proj", places)

    def fc1_gathered(self, graph: NestedBuilder, places: str) -> str:
        """The MLP's first layer for the channels of kept heads: int64 [h] -> [c, F]."""
        return self._gathered(graph, "fc1", places)

    def attend(self, graph: NestedBuilder, normed: str, which: HeadSet) -> str:
        """Attention with constant weights: normed rows [K, D] -> [K, c]."""
        rows = self.linear(graph, normed, "qkv", which, self._qkv_bias(graph, which))
        by_head = graph.op("Reshape", rows, graph.ints(0, 3 * len(which), self.arch.head_width))  # [K, 3h, d]
        parts = graph.ops("Split", by_head, outputs=3, axis=1, num_outputs=3)
        query, key, value = (
            graph.op("Transpose", part, perm=perm)
            for part, perm in zip(parts, ([1, 0, 2], [1, 2, 0], [1, 0, 2]), strict=True)
        )
        return self._mixed(graph, query, key, value)

    def attend_gathered(self, graph: NestedBuilder, normed: str, places: str) -> str:
        """Attention with the kept heads int64 [h]: normed rows [K, D] -> [K, c]."""
        rows = graph.op("MatMul", normed, graph.op("Gather", self._by_head(graph, "qkv"), places, axis=0))  # [h, K, 3d]
        if self.arch.qkv_bias:
            rows = graph.op("Add", rows, graph.op("Gather", self._by_head(graph, "qkv_bias"), places, axis=0))
        query, key, value = graph.ops("Split", rows, outputs=3, axis=2, num_outputs=3)
        return self._mixed(graph, query, graph.op("Transpose", key, perm=[0, 2, 1]), value)

    def fused(self, graph: NestedBuilder, normed: str, which: HeadSet) -> str:
        """As `attend`, in ONNX Runtime's own operator."""
        channels = len(which) * self.arch.head_width
        weight = graph.matrix(self._name("qkv", which) + ".T", lambda: self._weights(graph, which)["qkv"].T)
        bias = self._qkv_bias(graph, which) or graph.constant(f"no_bias_{channels}", np.zeros(3 * channels, np.float32))
        sizes: dict[str, Any] = {"num_heads": len(which), "qkv_hidden_sizes": [channels] * 3, "scale": 1.0}
        one = graph.op("Unsqueeze", normed, graph.ints(0))
        return graph.op("Squeeze", graph.op("Attention", one, weight, bias, domain=MICROSOFT, **sizes), graph.ints(0))

    def _mixed(self, graph: NestedBuilder, query: str, key: str, value: str) -> str:
        """Queries [h, K, d], which are scaled, keys [h, d, K] and values [h, K, d] -> [K, c]."""
        shares = graph.op("Softmax", graph.op("MatMul", query, key), axis=-1)
        mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[1, 0, 2])
        return graph.op("Reshape", mixed, graph.ints(0, -1))

    def _qkv_bias(self, graph: NestedBuilder, which: HeadSet) -> str:
        if not self.arch.qkv_bias:
            return ""
        return graph.matrix(self._name("qkv_bias", which), lambda: self._weights(graph, which)["qkv_bias"])

    def _name(self, kind: str, which: HeadSet) -> str:
        """What a constant is called."""
        every = kind == "fc2" or len(which) == self.arch.heads
        return f"blocks.{self.block}.{kind}" + ("" if every else ".heads_" + "_".join(map(str, which)))

    def _weights(self, graph: NestedBuilder, which: HeadSet) -> Arrays:
        return head_weights(self.arch, graph.tensors, BlockKey(self.block, BOTH, which))

    def _codes(self, graph: NestedBuilder, kind: str, which: HeadSet) -> Quantised:
        found = quantised_head_weights(self.arch, graph.tensors, BlockKey(self.block, BOTH, which))[kind]
        return cast(Quantised, found)

    def _by_head(self, graph: NestedBuilder, kind: str) -> str:
        """The weights of all heads, in a layout that has the heads first."""
        arch = self.arch
        heads, d = arch.heads, arch.head_width

        def make() -> Array:
            found = self._weights(graph, every_head(arch))[kind]
            if kind == "qkv":
                return found.reshape(3, heads, d, arch.width).transpose(1, 3, 0, 2).reshape(heads, arch.width, 3 * d)
            if kind == "qkv_bias":
                return found.reshape(3, heads, d).transpose(1, 0, 2).reshape(heads, 1, 3 * d)
            return found.reshape(-1, heads, d).transpose(1, 2, 0)

        return graph.matrix(f"blocks.{self.block}.{kind}.by_head", make)

    def _gathered(self, graph: NestedBuilder, kind: str, places: str) -> str:
        """Rows of kept heads: int64 [h] -> [c, out]."""
        out = self.arch.width if kind == "proj" else self.arch.hidden
        return graph.op("Reshape", graph.op("Gather", self._by_head(graph, kind), places, axis=0), graph.ints(-1, out))
