"""A block as graphs: its decisions, its two sub-layers with a choice of heads, and the whole of it.

Every graph works on one image's tokens [N, D], or on the kept ones [K, D]. With a choice of heads, the
weights are laid out head first, so that the kept heads' share is one gather of whole rows. The attention
scale is folded into the query's weights.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.export.graph import Graph
from adavit.export.weights import Weights

__all__ = [
    "add_attention",
    "add_mlp",
    "add_norm",
    "attention_graph",
    "decide_graph",
    "empty_graph",
    "full_graph",
    "mlp_graph",
]

Float = npt.NDArray[np.float32]

_PROJECTIONS = ("query", "key", "value")


def decide_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """X [N, D] -> norm1(x) [N, D] and the logits of the block's decisions: tokens [P], heads [H], sublayers [2]."""
    part = weights.under(f"blocks.{block}")
    graph = Graph(f"blocks.{block}.decide", opset)
    x = graph.input("x", [arch.tokens, arch.width])
    normed = add_norm(graph, arch, part, "norm1", x)
    graph.output("normed", normed, [arch.tokens, arch.width])
    if arch.token_policy:
        patches = graph.op("Slice", "normed", graph.ints(1), graph.ints(arch.tokens), graph.ints(0))
        logits = _linear(graph, part, "attn.token_select.mlp_head", patches)
        graph.output("tokens", graph.op("Squeeze", logits, graph.ints(1)), [arch.patches])
    first = ""
    for kind, name, size, present in (
        ("heads", "head_select", arch.heads, arch.adapts_heads(block)),
        ("sublayers", "layer_select", 2, arch.adapts_sublayers(block)),
    ):
        if present:
            first = first or graph.op("Slice", x, graph.ints(0), graph.ints(1), graph.ints(0))
            logits = _linear(graph, part, f"{name}.mlp_head", first)
            graph.output(kind, graph.op("Squeeze", logits, graph.ints(0)), [size])
    return graph


def attention_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x, norm1(x) [K, D] and the kept heads [h] -> x after the attention sub-layer."""
    graph, x, heads = _sublayer(arch, "attention", block, opset, normed=True)
    part = weights.under(f"blocks.{block}")
    graph.output("y", add_attention(graph, arch, part, x, "normed", heads), ["K", arch.width])
    return graph


def mlp_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """X [K, D] and the kept heads [h] -> x after the MLP sub-layer."""
    graph, x, heads = _sublayer(arch, "mlp", block, opset, normed=False)
    part = weights.under(f"blocks.{block}")
    graph.output("y", add_mlp(graph, arch, part, x, heads), ["K", arch.width])
    return graph


def full_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x, norm1(x) [K, D] -> x after both sub-layers with every head."""
    part = weights.under(f"blocks.{block}")
    graph = Graph(f"blocks.{block}.full", opset)
    x, normed = graph.input("x", ["K", arch.width]), graph.input("normed", ["K", arch.width])
    x = add_attention(graph, arch, part, x, normed, None)
    graph.output("y", add_mlp(graph, arch, part, x, None), ["K", arch.width])
    return graph


def empty_graph(arch: Architecture, weights: Weights, opset: int) -> Graph:
    """What the sub-layers of every block add without a head: attention [L, D] and mlp [L, D]."""
    graph = Graph("empty", opset)
    attention, mlp = [], []
    for block in range(arch.depth):
        part = weights.under(f"blocks.{block}")
        attention.append(part["attn.proj.bias"])
        hidden = part["mlp.fc1.bias"].astype(np.float64)
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        mlp.append(part["mlp.fc2.weight"].astype(np.float64) @ hidden + part["mlp.fc2.bias"])
    for name, rows in (("attention", attention), ("mlp", mlp)):
        constant = graph.weight(f"{name}.constant", np.stack(rows).astype(np.float32))
        graph.output(name, graph.op("Identity", constant), [arch.depth, arch.width])
    return graph


def _sublayer(arch: Architecture, kind: str, block: int, opset: int, normed: bool) -> tuple[Graph, str, str | None]:
    """A graph with its inputs: x, norm1(x) where it is wanted, and the kept heads where the block chooses."""
    graph = Graph(f"blocks.{block}.{kind}", opset)
    x = graph.input("x", ["K", arch.width])
    if normed:
        graph.input("normed", ["K", arch.width])
    return graph, x, graph.input("heads", ["h"], "int64") if arch.adapts_heads(block) else None


def add_norm(graph: Graph, arch: Architecture, part: Weights, name: str, x: str) -> str:
    """Adds a layer normalisation of the model."""
    weight, bias = (graph.weight(f"{part.prefix}{name}.{kind}", part[f"{name}.{kind}"]) for kind in ("weight", "bias"))
    return graph.layer_norm(x, weight, bias, arch.norm_epsilon)


def _linear(graph: Graph, part: Weights, name: str, x: str) -> str:
    product = graph.op("MatMul", x, graph.weight(part.prefix + f"{name}.weight", part[f"{name}.weight"].T))
    return _biased(graph, part, name, product)


def _biased(graph: Graph, part: Weights, name: str, x: str) -> str:
    return graph.op("Add", x, graph.weight(part.prefix + f"{name}.bias", part[f"{name}.bias"]))


def add_attention(
    graph: Graph, arch: Architecture, part: Weights, x: str, normed: str, heads: str | None, batched: bool = False
) -> str:
    """Adds the attention sub-layer, residual included: x, norm1(x) [K, D] -> [K, D].

    Args:
        graph: where to add.
        arch: the model's shapes.
        part: the block's weights.
        x: the block's input.
        normed: norm1 of it.
        heads: the kept heads [h], or None for all.
        batched: whether tokens come as [B, N, D]; only with all heads.
    """
    lead = [0] if batched else []
    swapped = [*lead, len(lead) + 1, len(lead), len(lead) + 2]  # tokens and heads change places
    shape = graph.ints(*lead, 0, arch.heads, arch.head_width)
    if heads is None:
        projected = (_projected(graph, arch, part, name, normed) for name in _PROJECTIONS)
        query, key, value = (graph.op("Transpose", graph.op("Reshape", p, shape), perm=swapped) for p in projected)
    else:
        query, key, value = _chosen_projections(graph, arch, part, normed, heads)
    turned = graph.op("Transpose", key, perm=[*lead, len(lead), len(lead) + 2, len(lead) + 1])
    mixed = graph.op("MatMul", graph.op("Softmax", graph.op("MatMul", query, turned), axis=-1), value)
    rows = graph.op("Transpose", mixed, perm=swapped)
    if heads is None:
        update = _linear(graph, part, "attn.proj", graph.op("Reshape", rows, graph.ints(*lead, 0, arch.width)))
    else:
        weight = _chosen(graph, part, "attn.proj", part["attn.proj.weight"].T, arch.heads, heads)
        update = _biased(graph, part, "attn.proj", graph.op("MatMul", _joined(graph, x, rows), weight))
    return graph.op("Add", update, x)


def _scaled(arch: Architecture, part: Weights, name: str, kind: str) -> Float:
    """The weight or bias of query, key or value, with the attention scale in the query's."""
    value = part[f"attn.{name}.{kind}"]
    return value * np.float32(arch.head_width**-0.5) if name == "query" else value


def _projected(graph: Graph, arch: Architecture, part: Weights, name: str, normed: str) -> str:
    """norm1(x) -> query, key or value of every head, side by side."""
    key = f"{part.prefix}attn.{name}"
    product = graph.op("MatMul", normed, graph.weight(f"{key}.weight", _scaled(arch, part, name, "weight").T))
    if not arch.qkv_bias:
        return product
    return graph.op("Add", product, graph.weight(f"{key}.bias", _scaled(arch, part, name, "bias")))


def _chosen_projections(graph: Graph, arch: Architecture, part: Weights, normed: str, heads: str) -> list[str]:
    """norm1(x) [K, D] -> query, key and value of the kept heads, each [h, K, d]."""
    key, d = f"{part.prefix}attn.qkv", arch.head_width

    def by_head(kind: str, *shape: int) -> Float:
        """Query, key and value of each head side by side, head first: [H, 3d, ...]."""
        return np.concatenate(
            [_scaled(arch, part, name, kind).reshape(arch.heads, d, *shape) for name in _PROJECTIONS], 1
        )

    weight = graph.weight(f"{key}.weight", by_head("weight", arch.width).transpose(0, 2, 1))
    product = graph.op("MatMul", normed, graph.op("Gather", weight, heads, axis=0))  # [h, K, 3d]
    if arch.qkv_bias:
        bias = graph.weight(f"{key}.bias", by_head("bias")[:, None])
        product = graph.op("Add", product, graph.op("Gather", bias, heads, axis=0))
    return graph.ops("Split", product, graph.ints(d, d, d), outputs=3, axis=2)


def add_mlp(graph: Graph, arch: Architecture, part: Weights, x: str, heads: str | None) -> str:
    """Adds the MLP sub-layer, residual included: x [K, D] -> [K, D]; heads None keeps every channel."""
    normed = add_norm(graph, arch, part, "norm2", x)
    if heads is None:
        hidden = _linear(graph, part, "mlp.fc1", normed)
    else:
        channels = graph.op("Reshape", normed, graph.ints(0, arch.heads, arch.head_width))
        channels = _joined(graph, x, graph.op("Gather", channels, heads, axis=1))
        weight = _chosen(graph, part, "mlp.fc1", part["mlp.fc1.weight"].T, arch.heads, heads)
        hidden = _biased(graph, part, "mlp.fc1", graph.op("MatMul", channels, weight))
    return graph.op("Add", _linear(graph, part, "mlp.fc2", graph.gelu(hidden)), x)


def _chosen(graph: Graph, part: Weights, name: str, weight: Float, count: int, heads: str) -> str:
    """The kept heads' rows of a weight [D, out]: [h * d, out]."""
    by_head = weight.reshape(count, -1)
    rows = graph.op("Gather", graph.weight(part.prefix + f"{name}.weight", by_head), heads, axis=0)
    return graph.op("Reshape", rows, graph.ints(-1, weight.shape[1]))


def _joined(graph: Graph, x: str, rows: str) -> str:
    """[K, h, d] -> [K, h * d], the shape made so that it holds for any K and h."""
    shape = graph.op("Concat", graph.op("Shape", x, start=0, end=1), graph.ints(-1), axis=0)
    return graph.op("Reshape", rows, shape)
