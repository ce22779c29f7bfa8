"""A block as graphs: its decisions, and each sub-layer twice: with all heads, masked, and with a choice of them.

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
    "attention_gather_graph",
    "attention_graph",
    "decide_graph",
    "empty_graph",
    "mlp_gather_graph",
    "mlp_graph",
]

Float = npt.NDArray[np.float32]

_PROJECTIONS = ("query", "key", "value")


def decide_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x [N, D] -> norm1(x) and the logits of the block's decisions.

    The outputs are normed [N, D], tokens [N, 1] (the class token's is not used) where tokens are decided on, and
    choices [1, H + 2], heads before sub-layers, where those are.
    """
    part = weights.under(f"blocks.{block}")
    graph = Graph(f"blocks.{block}.decide", opset)
    x = graph.input("x", [arch.tokens, arch.width])
    graph.output("normed", add_norm(graph, arch, part, "norm1", x), [arch.tokens, arch.width])
    if arch.token_policy:
        graph.output("tokens", _linear(graph, part, "attn.token_select.mlp_head", "normed"), [arch.tokens, 1])
    names = ["head_select"] * arch.adapts_heads(block) + ["layer_select"] * arch.adapts_sublayers(block)
    if names:
        weight, bias = (
            np.concatenate([part[f"{name}.mlp_head.{kind}"] for name in names]) for kind in ("weight", "bias")
        )
        first = graph.op("Slice", x, graph.ints(0), graph.ints(1), graph.ints(0))
        logits = graph.op("MatMul", first, graph.weight("choices.weight", weight.T))
        logits = graph.op("Add", logits, graph.weight("choices.bias", bias))
        graph.output("choices", logits, [1, len(bias)])
    return graph


def attention_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x, norm1(x) [K, D] and, where heads are decided on, their channels [D] -> x after the attention sub-layer."""
    graph = Graph(f"blocks.{block}.attention", opset)
    x, normed = (graph.input(name, ["K", arch.width]) for name in ("x", "normed"))
    channels = graph.input("channels", [arch.width]) if arch.adapts_heads(block) else None
    part = weights.under(f"blocks.{block}")
    graph.output("y", add_attention(graph, arch, part, x, normed, channels), ["K", arch.width])
    return graph


def attention_gather_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x, norm1(x) [K, D] and the kept heads [h] -> x after the attention sub-layer."""
    graph = Graph(f"blocks.{block}.attention_gather", opset)
    x, normed = (graph.input(name, ["K", arch.width]) for name in ("x", "normed"))
    heads = graph.input("heads", ["h"], "int64")
    part = weights.under(f"blocks.{block}")
    graph.output("y", _add_attention_gather(graph, arch, part, x, normed, heads), ["K", arch.width])
    return graph


def mlp_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x [K, D] and, where heads are decided on, their channels [D] -> x after the MLP sub-layer."""
    graph = Graph(f"blocks.{block}.mlp", opset)
    x = graph.input("x", ["K", arch.width])
    channels = graph.input("channels", [arch.width]) if arch.adapts_heads(block) else None
    part = weights.under(f"blocks.{block}")
    graph.output("y", add_mlp(graph, arch, part, x, channels), ["K", arch.width])
    return graph


def mlp_gather_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x [K, D] and the kept heads [h] -> x after the MLP sub-layer."""
    graph = Graph(f"blocks.{block}.mlp_gather", opset)
    x, heads = graph.input("x", ["K", arch.width]), graph.input("heads", ["h"], "int64")
    part = weights.under(f"blocks.{block}")
    normed = graph.op("Reshape", add_norm(graph, arch, part, "norm2", x), graph.ints(0, arch.heads, arch.head_width))
    channels = _joined(graph, x, graph.op("Gather", normed, heads, axis=1))
    product = graph.op("MatMul", channels, _chosen(graph, part, "mlp.fc1", arch.heads, heads))
    graph.output("y", _add_second_layer(graph, part, x, _biased(graph, part, "mlp.fc1", product)), ["K", arch.width])
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


def add_norm(graph: Graph, arch: Architecture, part: Weights, name: str, x: str, channels: str | None = None) -> str:
    """Adds a layer normalisation of the model, its result multiplied by channels [D] where there are any.

    The product is taken of the scale and the bias, which costs nothing per token.
    """
    weight, bias = (graph.weight(f"{part.prefix}{name}.{kind}", part[f"{name}.{kind}"]) for kind in ("weight", "bias"))
    if channels is not None:
        weight, bias = graph.op("Mul", weight, channels), graph.op("Mul", bias, channels)
    return graph.layer_norm(x, weight, bias, arch.norm_epsilon)


def _linear(graph: Graph, part: Weights, name: str, x: str) -> str:
    product = graph.op("MatMul", x, graph.weight(part.prefix + f"{name}.weight", part[f"{name}.weight"].T))
    return _biased(graph, part, name, product)


def _biased(graph: Graph, part: Weights, name: str, x: str) -> str:
    return graph.op("Add", x, graph.weight(part.prefix + f"{name}.bias", part[f"{name}.bias"]))


def add_attention(
    graph: Graph,
    arch: Architecture,
    part: Weights,
    x: str,
    normed: str,
    channels: str | None = None,
    batched: bool = False,
) -> str:
    """Adds the attention sub-layer with every head, residual included: [K, D] -> [K, D].

    Args:
        graph: where to add.
        arch: the model's shapes.
        part: the block's weights.
        x: the block's input.
        normed: norm1 of it.
        channels: 1 for the channels of kept heads, 0 for the others, [D]; None keeps all.
        batched: whether tokens come as [B, N, D].
    """
    lead = [0] if batched else []
    swapped = [*lead, len(lead) + 1, len(lead), len(lead) + 2]  # tokens and heads change places
    shape = graph.ints(*lead, 0, arch.heads, arch.head_width)
    projected = (_projected(graph, arch, part, name, normed) for name in _PROJECTIONS)
    query, key, value = (graph.op("Transpose", graph.op("Reshape", p, shape), perm=swapped) for p in projected)
    turned = graph.op("Transpose", key, perm=[*lead, len(lead), len(lead) + 2, len(lead) + 1])
    mixed = graph.op("MatMul", graph.op("Softmax", graph.op("MatMul", query, turned), axis=-1), value)
    rows = graph.op("Reshape", graph.op("Transpose", mixed, perm=swapped), graph.ints(*lead, 0, arch.width))
    if channels is not None:
        rows = graph.op("Mul", rows, channels)
    return graph.op("Add", _linear(graph, part, "attn.proj", rows), x)


def _add_attention_gather(graph: Graph, arch: Architecture, part: Weights, x: str, normed: str, heads: str) -> str:
    """Adds the attention sub-layer with the kept heads' weights only."""
    query, key, value = _chosen_projections(graph, arch, part, normed, heads)  # each [h, K, d]
    scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 2, 1]))
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
    rows = _joined(graph, x, graph.op("Transpose", mixed, perm=[1, 0, 2]))
    product = graph.op("MatMul", rows, _chosen(graph, part, "attn.proj", arch.heads, heads))
    return graph.op("Add", _biased(graph, part, "attn.proj", product), x)


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


def add_mlp(graph: Graph, arch: Architecture, part: Weights, x: str, channels: str | None = None) -> str:
    """Adds the MLP sub-layer with every channel, residual included: x [..., D] -> [..., D].

    Args:
        graph: where to add.
        arch: the model's shapes.
        part: the block's weights.
        x: the tokens.
        channels: 1 for the channels that enter the first layer, 0 for the others, [D]; None keeps all.
    """
    normed = add_norm(graph, arch, part, "norm2", x, channels)
    return _add_second_layer(graph, part, x, _linear(graph, part, "mlp.fc1", normed))


def _add_second_layer(graph: Graph, part: Weights, x: str, hidden: str) -> str:
    return graph.op("Add", _linear(graph, part, "mlp.fc2", graph.gelu(hidden)), x)


def _chosen(graph: Graph, part: Weights, name: str, count: int, heads: str) -> str:
    """The kept heads' input channels of a linear layer: [h * d, out]."""
    weight = part[f"{name}.weight"].T
    by_head = graph.weight(f"{part.prefix}{name}.weight", weight.reshape(count, -1))
    return graph.op("Reshape", graph.op("Gather", by_head, heads, axis=0), graph.ints(-1, weight.shape[1]))


def _joined(graph: Graph, x: str, rows: str) -> str:
    """[K, h, d] -> [K, h * d], the shape made so that it holds for any K and h."""
    shape = graph.op("Concat", graph.op("Shape", x, start=0, end=1), graph.ints(-1), axis=0)
    return graph.op("Reshape", rows, shape)
