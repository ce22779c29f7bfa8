"""Attention as ONNX Runtime's own operator, where the number of heads is known: one node in the place of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from adavit.bundle.head_weights import Array
from adavit.bundle.keys import ATTENTION
from adavit.bundle.onnx_format import Node
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.bundle.onnx_write import new_node

__all__ = ["DOMAINS", "Fused", "fuse_attention"]

DOMAINS = {"com.microsoft": 1}
"""Versions of further operator sets that a fused graph needs."""
AXIS, BIAS = "attention.axis", "attention.bias"


class Fused(NamedTuple):
    """A graph with attention in one node.

    Attributes:
        nodes: in the place of the graph's own.
        weights: the weights of heads, as these nodes read them.
        added: further constants.
    """

    nodes: Sequence[Node]
    weights: Mapping[str, Array]
    added: Mapping[str, Array]


def fuse_attention(graph: OnnxGraph, weights: Mapping[str, Array], heads: int) -> Fused | None:
    """Puts `com.microsoft.Attention` in the place of a block's attention; None where its nodes have other names.

    Args:
        graph: a block's, with attention, in fp32.
        weights: of its heads.
        heads: how many there are.
    """
    names = [node.name for node in graph.nodes]
    if not set(ATTENTION) <= set(names):
        return None
    first, last = (names.index(name) for name in ATTENTION)
    read, channels = graph.nodes[first].inputs[0], len(weights["qkv"]) // 3
    bias = "qkv_bias" if "qkv_bias" in weights else BIAS
    sizes = {"num_heads": heads, "qkv_hidden_sizes": [channels] * 3, "scale": 1.0}
    mixed = graph.nodes[last].outputs[0]
    fused = [
        new_node("Unsqueeze", "attention.batch", [read, AXIS], ["attention.batch"]),
        new_node("Attention", "attention", ["attention.batch", "qkv", bias], ["attention"], "com.microsoft", **sizes),
        new_node("Squeeze", mixed, ["attention", AXIS], [mixed]),
    ]
    added = {AXIS: np.zeros(1, np.int64)}
    if bias == BIAS:
        added[BIAS] = np.zeros(3 * channels, np.float32)
    nodes = [*graph.nodes[:first], *fused, *graph.nodes[last + 1 :]]
    return Fused(nodes, {**weights, "qkv": np.ascontiguousarray(weights["qkv"].T)}, added)
