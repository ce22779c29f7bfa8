"""The sub-layers with the weights of the kept heads only, and the gathering of those weights.

Weights are laid out head first, so that the share of a set of heads is a copy of whole rows. They are gathered
by engines of their own, for the runtime to keep: a set of heads that comes again costs no copy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.export.blocks import PROJECTIONS, add_bias, add_norm, add_second_layer, scaled
from adavit.export.graph import Graph
from adavit.export.weights import Weights

__all__ = ["attention_gather_graph", "attention_weights_graph", "mlp_gather_graph", "mlp_weights_graph"]

Float = npt.NDArray[np.float32]


def attention_weights_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """The kept heads [h] -> qkv [h, D, 3d], proj [h * d, D] and, where there is one, qkv_bias [h, 1, 3d]."""
    part = weights.under(f"blocks.{block}")
    graph = Graph(f"blocks.{block}.attention_weights", opset)
    heads = graph.input("heads", ["h"], "int64")

    def by_head(kind: str, *shape: int) -> Float:
        """Query, key and value of each head side by side, head first: [H, 3d, ...]."""
        values = [scaled(arch, part, name, kind).reshape(arch.heads, arch.head_width, *shape) for name in PROJECTIONS]
        return np.concatenate(values, axis=1)

    qkv = graph.weight("qkv.weight", by_head("weight", arch.width).transpose(0, 2, 1))
    graph.output("qkv", graph.op("Gather", qkv, heads, axis=0), ["h", arch.width, 3 * arch.head_width])
    graph.output("proj", _input_rows(graph, arch, part, "attn.proj", heads), ["c", arch.width])
    if arch.qkv_bias:
        bias = graph.weight("qkv.bias", by_head("bias")[:, None])
        graph.output("qkv_bias", graph.op("Gather", bias, heads, axis=0), ["h", 1, 3 * arch.head_width])
    return graph


def attention_gather_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x, norm1(x) [K, D] and what `attention_weights_graph` makes -> x after the attention sub-layer."""
    part, d = weights.under(f"blocks.{block}"), arch.head_width
    graph = Graph(f"blocks.{block}.attention_gather", opset)
    x, normed = (graph.input(name, ["K", arch.width]) for name in ("x", "normed"))
    qkv, proj = graph.input("qkv", ["h", arch.width, 3 * d]), graph.input("proj", ["c", arch.width])
    product = graph.op("MatMul", normed, qkv)  # [h, K, 3d]
    if arch.qkv_bias:
        product = graph.op("Add", product, graph.input("qkv_bias", ["h", 1, 3 * d]))
    query, key, value = graph.ops("Split", product, graph.ints(d, d, d), outputs=3, axis=2)
    scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 2, 1]))
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
    rows = _joined(graph, x, graph.op("Transpose", mixed, perm=[1, 0, 2]))
    update = add_bias(graph, part, "attn.proj", graph.op("MatMul", rows, proj))
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
    product = graph.op("MatMul", _joined(graph, x, graph.op("Gather", normed, heads, axis=1)), fc1)
    graph.output("y", add_second_layer(graph, part, x, add_bias(graph, part, "mlp.fc1", product)), ["K", arch.width])
    return graph


def _input_rows(graph: Graph, arch: Architecture, part: Weights, name: str, heads: str) -> str:
    """The kept heads' input channels of a linear layer: [h * d, out]."""
    weight = part[f"{name}.weight"].T
    by_head = graph.weight(f"{name}.weight", weight.reshape(arch.heads, -1))
    return graph.op("Reshape", graph.op("Gather", by_head, heads, axis=0), graph.ints(-1, weight.shape[1]))


def _joined(graph: Graph, x: str, rows: str) -> str:
    """[K, h, d] -> [K, h * d], the shape made so that it holds for any K and h."""
    shape = graph.op("Concat", graph.op("Shape", x, start=0, end=1), graph.ints(-1), axis=0)
    return graph.op("Reshape", rows, shape)
