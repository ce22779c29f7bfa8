"""The sub-layers with the weights of the kept heads only, and the gathering of those weights.

Weights are laid out head first, so that the share of a set of heads is a copy of whole rows. They are gathered
by engines of their own, for the runtime to keep: a set of heads that comes again costs no copy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.export.blocks import PROJECTIONS, add_bias, add_norm, add_second_layer, scaled, value_bias
from adavit.export.graph import Graph
from adavit.export.weights import Weights

__all__ = [
    "attention_gather_graph",
    "attention_weights_graph",
    "mlp_gather_graph",
    "mlp_weights_graph",
]

Float = npt.NDArray[np.float32]


def attention_weights_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """The kept heads [h] -> qkv [h, 3d, D], proj [h * d, D] and, with biases, query_bias [h, d, 1], bias [D].

    The key's bias adds the same to all scores of a query, which the softmax takes away again. The value's is added to
    every row alike, since rows of the softmax sum to 1: `bias` is what the output projection makes of it, and its own.
    """
    part, d = weights.under(f"blocks.{block}"), arch.head_width
    graph = Graph(f"blocks.{block}.attention_weights", opset)
    heads = graph.input("heads", ["h"], "int64")
    by_head = [scaled(arch, part, name, "weight").reshape(arch.heads, d, arch.width) for name in PROJECTIONS]
    qkv = graph.weight("qkv.weight", np.concatenate(by_head, axis=1))
    graph.output("qkv", graph.op("Gather", qkv, heads, axis=0), ["h", 3 * d, arch.width])
    graph.output("proj", _input_rows(graph, arch, part, "attn.proj", heads), ["c", arch.width])
    if arch.qkv_bias:
        query_bias = graph.weight("query.bias", scaled(arch, part, "query", "bias").reshape(arch.heads, d, 1))
        graph.output("query_bias", graph.op("Gather", query_bias, heads, axis=0), ["h", d, 1])
        added = graph.weight("value.bias", value_bias(arch, part))
        added = graph.op("ReduceSum", graph.op("Gather", added, heads, axis=0), graph.ints(0), keepdims=0)
        graph.output("bias", add_bias(graph, part, "attn.proj", added), [arch.width])
    return graph


def attention_gather_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x, norm1(x) [K, D] and what `attention_weights_graph` makes -> x after the attention sub-layer.

    The gathered weights are the left factor, since backends rearrange the right one on every call: queries, keys and
    values come as [h, d, K].
    """
    part, d = weights.under(f"blocks.{block}"), arch.head_width
    graph = Graph(f"blocks.{block}.attention_gather", opset)
    x, normed = (graph.input(name, ["K", arch.width]) for name in ("x", "normed"))
    qkv, proj = graph.input("qkv", ["h", 3 * d, arch.width]), graph.input("proj", ["c", arch.width])
    product = graph.op("MatMul", qkv, graph.op("Transpose", normed, perm=[1, 0]))  # [h, 3d, K]
    query, key, value = graph.ops("Split", product, graph.ints(d, d, d), outputs=3, axis=1)
    if arch.qkv_bias:
        query = graph.op("Add", query, graph.input("query_bias", ["h", d, 1]))
    scores = graph.op("MatMul", graph.op("Transpose", query, perm=[0, 2, 1]), key)
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), graph.op("Transpose", value, perm=[0, 2, 1]))
    update = graph.op("MatMul", _joined(graph, graph.op("Transpose", mixed, perm=[1, 0, 2])), proj)
    if arch.qkv_bias:
        update = graph.op("Add", update, graph.input("bias", [arch.width]))
    else:
        update = add_bias(graph, part, "attn.proj", update)
    graph.output("y", graph.op("Add", update, x), ["K", arch.width])
    return graph


def mlp_weights_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """The kept heads [h] -> their rows of the first layer, fc1 [h * d, hidden]."""
    graph = Graph(f"blocks.{block}.mlp_weights", opset)
    heads = graph.input("heads", ["h"], "int64")
    rows = _input_rows(graph, arch, weights.under(f"blocks.{block}"), "mlp.fc1", heads)
    graph.output("fc1", rows, ["c", arch.hidden])
    return graph


def mlp_gather_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x [K, D], the kept heads [h] and what `mlp_weights_graph` makes -> x after the MLP sub-layer."""
    part = weights.under(f"blocks.{block}")
    graph = Graph(f"blocks.{block}.mlp_gather", opset)
    x, heads = graph.input("x", ["K", arch.width]), graph.input("heads", ["h"], "int64")
    fc1 = graph.input("fc1", ["c", arch.hidden])
    normed = graph.op("Reshape", add_norm(graph, arch, part, "norm2", x), graph.ints(0, arch.heads, arch.head_width))
    product = graph.op("MatMul", _joined(graph, graph.op("Gather", normed, heads, axis=1)), fc1)
    graph.output("y", add_second_layer(graph, part, x, add_bias(graph, part, "mlp.fc1", product)), ["K", arch.width])
    return graph


def _input_rows(graph: Graph, arch: Architecture, part: Weights, name: str, heads: str) -> str:
    """The kept heads' input channels of a linear layer: [h * d, out]."""
    weight = part[f"{name}.weight"].T
    by_head = graph.weight(f"{name}.weight", weight.reshape(arch.heads, -1))
    return graph.op("Reshape", graph.op("Gather", by_head, heads, axis=0), graph.ints(-1, weight.shape[1]))


def _joined(graph: Graph, rows: str) -> str:
    """[K, h, d] -> [K, h * d]."""
    return graph.op("Reshape", rows, graph.ints(0, -1))
