"""A block as graphs, one for each combination of sub-layers that it may run.

    x [N, D], the numbers of the kept tokens, tokens [K], and the weights of the h kept heads (c = h * d channels):
    qkv [3c, D], qkv_bias [3c] and proj [D, c] of attention; the heads' numbers, heads [h], fc1 [hidden, c] and
    fc2 [D, hidden] of the MLP
    -> y [N, D], decisions [1, M]

Kept rows are gathered, the sub-layers run on them, and they are put back. Then the next block's decisions are made:
the logits of its tokens [N] (the class token's means nothing), heads [H] and sub-layers [2], as far as it has policies
for them. Behind the last block, the logits of the classes [1, C] come in their place. Where no sub-layer runs, this is
all there is.

The weights have the checkpoint's layouts, [out, in]; queries are scaled by them, see `adavit.bundle.head_weights`.

What the linear layers read has names, which calibration finds it by: qkv.input, mixed, fc1.input and fc2.input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from adavit.architecture import Architecture
from adavit.bundle.keys import ATTENTION, Sublayers
from adavit.graphs.builder import Builder
from adavit.graphs.precision import Precision

__all__ = [
    "add_attention",
    "add_block",
    "add_decision_logits",
    "add_decisions",
    "add_head",
    "add_mlp",
    "add_norm",
    "add_update",
]


def add_block(
    graph: Builder, arch: Architecture, block: int, sublayers: Sublayers, precisions: Mapping[str, Precision]
) -> None:
    """Makes a graph a block's; `precisions` are of its sub-layers, "attention" and "mlp", that run."""
    size: list[int | str] = [arch.tokens, arch.width]
    x = graph.input("x", size)
    y = x
    if any(sublayers):
        kept = graph.input("tokens", ["K"], "int64") if arch.token_policy else ""
        rows = graph.op("Gather", x, kept, axis=0) if kept else x
        if sublayers.attention:
            rows = _attention(graph, arch, block, rows, precisions["attention"])
        if sublayers.mlp:
            rows = _mlp(graph, arch, block, rows, precisions["mlp"])
        y = graph.op("ScatterND", x, graph.op("Unsqueeze", kept, graph.ints(1)), rows) if kept else rows
        graph.output("y", y, size)
        y = "y"
    if block + 1 < arch.depth:
        add_decisions(graph, arch, block + 1, y)
    else:
        first = graph.op("Slice", y, graph.ints(0), graph.ints(1), graph.ints(0))
        add_head(graph, arch, first)


def _attention(graph: Builder, arch: Architecture, block: int, x: str, precision: Precision) -> str:
    """Attention with the handed heads: [K, D] -> [K, D]."""
    dtype = precision.dtype
    weights = {"qkv": graph.input("qkv", ["3c", arch.width], dtype)}
    if arch.qkv_bias:
        weights["qkv_bias"] = graph.input("qkv_bias", ["3c"], dtype)
    weights["proj"] = graph.input("proj", [arch.width, "c"], dtype)
    return add_attention(graph, arch, block, x, weights, precision)


def _mlp(graph: Builder, arch: Architecture, block: int, x: str, precision: Precision) -> str:
    """The MLP on the channels of the handed heads: [K, D] -> [K, D]."""
    heads = graph.input("heads", ["h"], "int64") if arch.adapts_heads(block) else ""
    channels: int | str = "c" if heads else arch.width
    weights = {
        "fc1": graph.input("fc1", [arch.hidden, channels], precision.dtype),
        "fc2": graph.input("fc2", [arch.width, arch.hidden], precision.dtype),
    }
    return add_mlp(graph, arch, block, x, weights, precision, heads)


def add_norm(graph: Builder, arch: Architecture, x: str, weights: str, tensors: str, name: str | None = None) -> str:
    """A layer normalisation of the model; its weights' names begin so in this graph, and in the weights' file."""
    weight, bias = (graph.weight(f"{weights}.{kind}", f"{tensors}.{kind}") for kind in ("weight", "bias"))
    return graph.layer_norm(x, weight, bias, arch.norm_epsilon, name)


def add_attention(
    graph: Builder,
    arch: Architecture,
    block: int,
    x: str,
    weights: dict[str, str],
    precision: Precision,
    prefix: str = "",
) -> str:
    """The attention sub-layer, residual included: [K, D] -> [K, D].

    Args:
        graph: where to add.
        arch: the model's shapes.
        block: its position.
        x: the tokens.
        weights: the values that hold qkv, qkv_bias where the model has one, and proj.
        precision: of the linear layers.
        prefix: of the names of weights in this graph.
    """
    site, d = f"blocks.{block}", arch.head_width
    normed = add_norm(graph, arch, x, f"{prefix}norm1", f"{site}.norm1", f"{prefix}qkv.input")
    read = precision.enter(graph, normed, f"{site}.qkv", prefix)
    qkv = graph.op("Gemm", read, weights["qkv"], transB=1, name=f"{prefix}{ATTENTION[0]}")
    if "qkv_bias" in weights:
        qkv = graph.op("Add", qkv, weights["qkv_bias"])
    parts = graph.op("Reshape", qkv, graph.ints(0, 3, -1, d))  # [K, 3, h, d]
    query, key, value = (
        graph.op("Transpose", graph.op("Gather", parts, graph.constant(f"part_{i}", np.int64(i)), axis=1), perm=perm)
        for i, perm in enumerate(([1, 0, 2], [1, 2, 0], [1, 0, 2]))
    )
    scores = precision.leave(graph, graph.op("MatMul", query, key))
    shares = precision.enter(graph, graph.op("Softmax", scores, axis=-1))
    mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[1, 0, 2])
    mixed = graph.op("Reshape", mixed, graph.ints(0, -1), name=f"{prefix}{ATTENTION[1]}")
    return add_update(graph, block, "attn", "proj", mixed, weights["proj"], x, precision, prefix)


def add_mlp(
    graph: Builder,
    arch: Architecture,
    block: int,
    x: str,
    weights: dict[str, str],
    precision: Precision,
    heads: str = "",
    prefix: str = "",
) -> str:
    """The MLP sub-layer, residual included: [K, D] -> [K, D].

    Args:
        graph: where to add.
        arch: the model's shapes.
        block: its position.
        x: the tokens.
        weights: the values that hold fc1 and fc2.
        precision: of the linear layers.
        heads: the numbers of those whose channels enter, or "" for all channels.
        prefix: of the names of weights in this graph.
    """
    site = f"blocks.{block}"
    read = f"{prefix}fc1.input"
    normed = add_norm(graph, arch, x, f"{prefix}norm2", f"{site}.norm2", None if heads else read)
    if heads:
        by_head = graph.op("Reshape", normed, graph.ints(0, arch.heads, arch.head_width))
        normed = graph.op("Reshape", graph.op("Gather", by_head, heads, axis=1), graph.ints(0, -1), name=read)
    hidden = graph.op("Gemm", precision.enter(graph, normed, f"{site}.fc1", prefix), weights["fc1"], transB=1)
    hidden = graph.op("Add", hidden, _own(graph, block, prefix, "mlp.fc1.bias"))
    hidden = graph.gelu(hidden, f"{prefix}fc2.input", precision.dtype)
    return add_update(graph, block, "mlp", "fc2", hidden, weights["fc2"], x, precision, prefix)


def _own(graph: Builder, block: int, prefix: str, name: str) -> str:
    """A weight of the block itself."""
    return graph.weight(prefix + name, f"blocks.{block}.{name}")


def add_update(
    graph: Builder, block: int, part: str, role: str, rows: str, weight: str, x: str, precision: Precision, prefix: str
) -> str:
    """The last linear layer of a sub-layer, "attn", "proj" or "mlp", "fc2", and the residual x: [K, in] -> [K, D]."""
    # In fp16, what another linear layer made is that already.
    read = rows if precision.name == "fp16" else precision.enter(graph, rows, f"blocks.{block}.{role}", prefix)
    update = graph.op("Gemm", read, weight, transB=1)
    update = graph.op("Add", update, _own(graph, block, prefix, f"{part}.{role}.bias"))
    return graph.op("Add", precision.leave(graph, update), x)


def add_decisions(graph: Builder, arch: Architecture, block: int, x: str) -> None:
    """Adds the logits of a block's decisions on x [N, D]: the output decisions [1, M], if there are any."""
    found = list(
        add_decision_logits(
            graph, arch, block, x, lambda: graph.op("Slice", x, graph.ints(0), graph.ints(1), graph.ints(0))
        ).values()
    )
    if found:
        count = arch.tokens * arch.token_policy + arch.policy_outputs(block)
        decisions = graph.op("Concat", *found, axis=1) if len(found) > 1 else found[0]
        graph.output("decisions", decisions, [1, count])


def add_decision_logits(
    graph: Builder, arch: Architecture, block: int, rows: str, class_tokens: Callable[[], str]
) -> dict[str, str]:
    """Adds the logits of a block's decisions, by their kinds, as far as it has policies.

    Args:
        graph: where to add.
        arch: the model's shapes.
        block: its position.
        rows: the tokens of all images, [B * N, D].
        class_tokens: adds the class tokens [B, D].

    Returns:
        tokens [1, B * N], heads [B, H], sublayers [B, 2].
    """
    site, found = f"blocks.{block}", {}
    if arch.token_policy:
        normed = add_norm(graph, arch, rows, "next.norm1", f"{site}.norm1")
        vector, offset = _selecting(graph, site, "attn.token_select")
        found["tokens"] = graph.op("Gemm", vector, normed, offset, transB=1)  # the vector first: half the time
    first = class_tokens() if arch.policy_outputs(block) else ""
    kinds = {
        "heads": ("head_select", arch.adapts_heads(block)),
        "sublayers": ("layer_select", arch.adapts_sublayers(block)),
    }
    for kind, (name, adapts) in kinds.items():
        if adapts:
            found[kind] = graph.op("Gemm", first, *_selecting(graph, site, name), transB=1)
    return found


def _selecting(graph: Builder, site: str, name: str) -> tuple[str, str]:
    """Weight and bias of a policy."""
    weight, bias = (
        graph.weight(f"next.{name}.mlp_head.{kind}", f"{site}.{name}.mlp_head.{kind}") for kind in ("weight", "bias")
    )
    return weight, bias


def add_head(graph: Builder, arch: Architecture, classes: str, batch: int | str = 1) -> None:
    """Adds the model's head: the class tokens [B, D] behind the last block to the output logits [B, C]."""
    normed = add_norm(graph, arch, classes, "norm", "norm")
    logits = graph.op("Gemm", normed, graph.weight("head.weight", "head.weight"), transB=1)
    logits = graph.op("Add", logits, graph.weight("head.bias", "head.bias"))
    graph.output("logits", logits, [batch, arch.classes])
