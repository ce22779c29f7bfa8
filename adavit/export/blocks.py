"""A block as graphs: its decisions, and its sub-layers with all heads, the dropped ones masked.

Every graph works on one image's tokens [N, D], or on the kept ones [K, D]. The attention scale is folded into
the query's weights.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.export.graph import Graph
from adavit.export.weights import Weights

__all__ = [
    "PROJECTIONS",
    "add_attention",
    "add_bias",
    "add_choice_logits",
    "add_head",
    "add_mlp",
    "add_norm",
    "add_second_layer",
    "add_token_logits",
    "attention_graph",
    "decide_graph",
    "empty_graph",
    "mlp_graph",
    "scaled",
    "value_bias",
]

Float = npt.NDArray[np.float32]

PROJECTIONS = ("query", "key", "value")


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
        logits = add_token_logits(graph, part, "normed")
        graph.output("tokens", graph.op("Reshape", logits, graph.ints(-1, 1)), [arch.tokens, 1])
    if count := arch.choices(block):
        graph.output("choices", add_choice_logits(graph, arch, part, block, x), [1, count])
    return graph


def add_token_logits(graph: Graph, part: Weights, normed: str) -> str:
    """Adds the logits of a block's decisions on tokens, from norm1(x) [N, D]: [1, N]."""
    select = part.under("attn.token_select.mlp_head")
    vector, offset = (graph.weight(select.prefix + kind, select[kind]) for kind in ("weight", "bias"))
    return graph.op("Gemm", vector, normed, offset, transB=1)  # the vector first: half the time


def add_choice_logits(graph: Graph, arch: Architecture, part: Weights, block: int, x: str) -> str:
    """Adds the logits of a block's decisions on heads, then sub-layers, from x [N, D]: [1, arch.choices(block)]."""
    names = ["head_select"] * arch.adapts_heads(block) + ["layer_select"] * arch.adapts_sublayers(block)
    weight, bias = (np.concatenate([part[f"{name}.mlp_head.{kind}"] for name in names]) for kind in ("weight", "bias"))
    first = graph.op("Slice", x, graph.ints(0), graph.ints(1), graph.ints(0))
    return graph.op("Gemm", first, graph.weight("choices.weight", weight.T), graph.weight("choices.bias", bias))


def add_head(graph: Graph, arch: Architecture, weights: Weights, classes: str) -> None:
    """Adds the model's head: the class tokens [B, D] of the last block to the output logits [B, C]."""
    normed = add_norm(graph, arch, weights, "norm", classes)
    weight = graph.weight("head.weight", weights["head.weight"].T)
    logits = graph.op("Add", graph.op("MatMul", normed, weight), graph.weight("head.bias", weights["head.bias"]))
    graph.output("logits", logits, ["B", arch.classes])


def attention_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x, norm1(x) [K, D] and, where heads are decided on, their channels [D] -> x after the attention sub-layer."""
    graph = Graph(f"blocks.{block}.attention", opset)
    x, normed = (graph.input(name, ["K", arch.width]) for name in ("x", "normed"))
    channels = graph.input("channels", [arch.width]) if arch.adapts_heads(block) else None
    part = weights.under(f"blocks.{block}")
    graph.output("y", add_attention(graph, arch, part, x, normed, channels), ["K", arch.width])
    return graph


def mlp_graph(arch: Architecture, weights: Weights, block: int, opset: int) -> Graph:
    """x [K, D] and, where heads are decided on, their channels [D] -> x after the MLP sub-layer."""
    graph = Graph(f"blocks.{block}.mlp", opset)
    x = graph.input("x", ["K", arch.width])
    channels = graph.input("channels", [arch.width]) if arch.adapts_heads(block) else None
    part = weights.under(f"blocks.{block}")
    graph.output("y", add_mlp(graph, arch, part, x, channels), ["K", arch.width])
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
    return add_bias(graph, part, name, product)


def add_bias(graph: Graph, part: Weights, name: str, x: str) -> str:
    """Adds the bias of a linear layer of the block."""
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
    projected = (_projected(graph, arch, part, name, normed) for name in PROJECTIONS)
    query, key, value = (graph.op("Transpose", graph.op("Reshape", p, shape), perm=swapped) for p in projected)
    turned = graph.op("Transpose", key, perm=[*lead, len(lead), len(lead) + 2, len(lead) + 1])
    mixed = graph.op("MatMul", graph.op("Softmax", graph.op("MatMul", query, turned), axis=-1), value)
    rows = graph.op("Reshape", graph.op("Transpose", mixed, perm=swapped), graph.ints(*lead, 0, arch.width))
    if channels is not None:
        rows = graph.op("Mul", rows, channels)
    return graph.op("Add", _linear(graph, part, "attn.proj", rows), x)


def scaled(arch: Architecture, part: Weights, name: str, kind: str) -> Float:
    """The weight or bias of query, key or value, with the attention scale in the query's."""
    value = part[f"attn.{name}.{kind}"]
    return value * np.float32(arch.head_width**-0.5) if name == "query" else value


def value_bias(arch: Architecture, part: Weights) -> Float:
    """What the value's bias of each head adds to every row behind the output projection: [H, D]."""
    bias = part["attn.value.bias"].reshape(arch.heads, 1, -1)
    by_head = part["attn.proj.weight"].T.reshape(arch.heads, -1, arch.width)
    added: Float = np.matmul(bias, by_head, dtype=np.float64)[:, 0].astype(np.float32)
    return added


def _projected(graph: Graph, arch: Architecture, part: Weights, name: str, normed: str) -> str:
    """norm1(x) -> query, key or value of every head, side by side.

    The key's bias adds the same to all scores of a query, which the softmax takes away again: it is left out.
    """
    key = f"{part.prefix}attn.{name}"
    product = graph.op("MatMul", normed, graph.weight(f"{key}.weight", scaled(arch, part, name, "weight").T))
    if not arch.qkv_bias or name == "key":
        return product
    return graph.op("Add", product, graph.weight(f"{key}.bias", scaled(arch, part, name, "bias")))


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
    return add_second_layer(graph, part, x, _linear(graph, part, "mlp.fc1", normed))


def add_second_layer(graph: Graph, part: Weights, x: str, hidden: str) -> str:
    """Adds the rest of the MLP sub-layer behind its first layer: GELU, the second layer and the residual x."""
    return graph.op("Add", _linear(graph, part, "mlp.fc2", graph.gelu(hidden)), x)
