"""A block inside a single file: it decides, then runs each sub-layer under an `If`, on the rows of the kept tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from adavit.architecture import Architecture
from adavit.bundle.keys import BOTH, BlockKey
from adavit.bundle.head_weights import head_weights
from adavit.graphs.block import add_norm
from adavit.graphs.nested import NestedBuilder

__all__ = ["Decisions", "HeadGroups", "add_nested_block"]

HeadGroups = tuple[tuple[int, ...], ...]
"""How a block runs its heads. Groups of heads: each runs where any of its heads is kept, with dropped ones masked.
No group at all: the weights of the kept heads are gathered."""


class Decisions(NamedTuple):
    """The masks of a block, bool: tokens [1, N], heads [1, H], sublayers [1, 2]; "" where it has no such policy."""

    tokens: str
    heads: str
    sublayers: str


def add_nested_block(
    graph: NestedBuilder, arch: Architecture, block: int, x: str, bounds: Sequence[str], groups: HeadGroups
) -> tuple[str, Decisions]:
    """Adds a block to the graph of an image: tokens [N, D] -> tokens [N, D], and what was kept."""
    normed, kept = _decide(graph, arch, block, x, bounds)
    every: list[int | str] = [arch.tokens, arch.width]
    some: list[int | str] = ["K", arch.width]

    def run(inner: NestedBuilder) -> str:
        places = ""
        rows, normed_rows = x, normed
        if kept.tokens:
            places = inner.op("Reshape", inner.op("NonZero", inner.op("Reshape", kept.tokens, inner.ints(-1))), inner.ints(-1, 1))
            flat = inner.op("Reshape", places, inner.ints(-1))
            rows = inner.op("Gather", x, flat, axis=0)
            normed_rows = inner.op("Gather", normed, flat, axis=0)
        rows = _if(inner, attention, lambda g: _attention(g, arch, block, rows, normed_rows, kept.heads, groups), rows, some)
        rows = _if(inner, mlp, lambda g: _mlp(g, arch, block, rows, kept.heads, groups), rows, some)
        return inner.op("ScatterND", x, places, rows) if places else rows

    attention = mlp = ""
    if not kept.sublayers:
        return run(graph), kept
    flags = graph.op("Reshape", kept.sublayers, graph.ints(2))
    attention, mlp = (graph.op("Gather", flags, graph.constant(f"part_{i}", np.int64(i)), axis=0) for i in (0, 1))
    return _if(graph, graph.op("Or", attention, mlp), run, x, every), kept


def _if(graph: NestedBuilder, condition: str, then, otherwise: str, shape: list[int | str]) -> str:
    """What `then` makes where a condition holds or there is none, else a value as it is."""
    if not condition:
        return then(graph)
    return graph.branch(condition, lambda g: [then(g)], lambda g: [otherwise], [("float32", shape)])[0]


def _decide(graph: NestedBuilder, arch: Architecture, block: int, x: str, bounds: Sequence[str]) -> tuple[str, Decisions]:
    site = f"blocks.{block}"
    normed = add_norm(graph, arch, x, "", f"{site}.norm1")
    tokens = heads = sublayers = ""
    if arch.token_policy:
        weight, bias = (graph.weight("", f"{site}.attn.token_select.mlp_head.{kind}") for kind in ("weight", "bias"))
        logits = graph.op("Gemm", weight, normed, bias, transB=1)
        first = graph.constant("class_token", np.arange(arch.tokens)[None] == 0)
        tokens = graph.op("Or", graph.op("Greater", logits, bounds[0]), first)
    first = graph.op("Slice", x, graph.ints(0), graph.ints(1), graph.ints(0)) if arch.policy_outputs(block) else ""

    def chosen(name: str, bound: str) -> str:
        weight, bias = (graph.weight("", f"{site}.{name}.mlp_head.{kind}") for kind in ("weight", "bias"))
        return graph.op("Greater", graph.op("Gemm", first, weight, bias, transB=1), bound)

    if arch.adapts_heads(block):
        heads = chosen("head_select", bounds[1])
    if arch.adapts_sublayers(block):
        sublayers = chosen("layer_select", bounds[2])
    return normed, Decisions(tokens, heads, sublayers)


def _all(arch):
    return tuple(range(arch.heads))


def _attention(graph, arch, block, rows, normed, heads, groups):
    site = f"blocks.{block}.attn"
    rows = graph.op("Add", rows, graph.weight("", f"{site}.proj.bias"))
    if not heads:
        return _attend_group(graph, arch, block, rows, normed, "", _all(arch))
    if not groups:
        return _attend_gathered(graph, arch, block, rows, normed, heads)
    for group in groups:
        rows = _group(graph, arch, heads, group, rows, lambda g, group=group, rows=rows: _attend_group(g, arch, block, rows, normed, heads, group), arch.width)
    return rows


def _group(graph, arch, heads, group, rows, make, width):
    """Runs a group where any of its heads is kept."""
    if len(group) == arch.heads:
        return make(graph)
    mine = graph.op("Gather", graph.op("Reshape", heads, graph.ints(-1)), graph.constant(f"heads_{'_'.join(map(str, group))}", np.array(group, np.int64)))
    any_kept = graph.op("Cast", graph.op("ReduceMax", graph.op("Cast", mine, to=TensorProto.FLOAT), keepdims=0), to=TensorProto.BOOL)
    return _if(graph, any_kept, make, rows, ["K", width])


def _mask(graph, arch, values, heads, group):
    """values [K, h, d] of a group times the mask of heads."""
    if not heads or len(group) == 1:
        return values
    mask = graph.op("Reshape", heads, graph.ints(-1, 1))
    if len(group) < arch.heads:
        mask = graph.op("Gather", mask, graph.constant(f"heads_{'_'.join(map(str, group))}", np.array(group, np.int64)), axis=0)
    return graph.op("Mul", values, graph.op("Cast", mask, to=TensorProto.FLOAT))


def _weights(graph, arch, block, group, name):
    tag = "" if len(group) == arch.heads else ".heads_" + "_".join(map(str, group))
    def make():
        return head_weights(arch, graph._tensors, BlockKey(block, BOTH, group))[name]
    return graph.matrix(f"blocks.{block}.{name}{tag}", make)


def _attend_group(graph, arch, block, rows, normed, heads, group):
    d = arch.head_width
    bias = [_weights(graph, arch, block, group, "qkv_bias")] if arch.qkv_bias else []
    qkv = graph.op("Gemm", normed, _weights(graph, arch, block, group, "qkv"), *bias, transB=1)
    parts = graph.op("Reshape", qkv, graph.ints(0, 3, -1, d))
    query, key, value = (
        graph.op("Transpose", graph.op("Gather", parts, graph.constant(f"part_{i}", np.int64(i)), axis=1), perm=perm)
        for i, perm in enumerate(([1, 0, 2], [1, 2, 0], [1, 0, 2]))
    )
    shares = graph.op("Softmax", graph.op("MatMul", query, key), axis=-1)
    mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[1, 0, 2])
    mixed = graph.op("Reshape", _mask(graph, arch, mixed, heads, group), graph.ints(0, -1))
    return graph.op("Add", graph.op("Gemm", mixed, _weights(graph, arch, block, group, "proj"), transB=1), rows)


def _attend_gathered(graph, arch, block, rows, normed, heads):
    d, D, H = arch.head_width, arch.width, arch.heads
    full = _all(arch)
    def whole(name): return head_weights(arch, graph._tensors, BlockKey(block, BOTH, full))[name]
    places = graph.op("Reshape", graph.op("NonZero", graph.op("Reshape", heads, graph.ints(-1))), graph.ints(-1))
    weight = graph.matrix(f"blocks.{block}.qkv.by_head", lambda: whole("qkv").reshape(3, H, d, D).transpose(1, 3, 0, 2).reshape(H, D, 3 * d))
    qkv = graph.op("MatMul", normed, graph.op("Gather", weight, places, axis=0))  # [h, K, 3 d]
    if arch.qkv_bias:
        bias = graph.matrix(f"blocks.{block}.qkv_bias.by_head", lambda: whole("qkv_bias").reshape(3, H, d).transpose(1, 0, 2).reshape(H, 1, 3 * d))
        qkv = graph.op("Add", qkv, graph.op("Gather", bias, places, axis=0))
    query, key, value = graph.ops("Split", qkv, outputs=3, axis=2, num_outputs=3)
    shares = graph.op("Softmax", graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 2, 1])), axis=-1)
    mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[1, 0, 2])
    proj = graph.matrix(f"blocks.{block}.proj.by_head", lambda: whole("proj").reshape(D, H, d).transpose(1, 2, 0))
    proj = graph.op("Reshape", graph.op("Gather", proj, places, axis=0), graph.ints(-1, D))
    update = graph.op("Gemm", graph.op("Reshape", mixed, graph.ints(0, -1)), proj)
    return graph.op("Add", update, rows)


def _mlp(graph, arch, block, rows, heads, groups):
    site, d, D, H, F = f"blocks.{block}", arch.head_width, arch.width, arch.heads, arch.hidden
    normed = add_norm(graph, arch, rows, "", f"{site}.norm2")
    bias = graph.weight("", f"{site}.mlp.fc1.bias")
    if not heads:
        hidden = graph.op("Gemm", normed, graph.weight("", f"{site}.mlp.fc1.weight"), bias, transB=1)
    else:
        by_head = graph.op("Reshape", normed, graph.ints(0, H, d))
        if not groups:
            places = graph.op("Reshape", graph.op("NonZero", graph.op("Reshape", heads, graph.ints(-1))), graph.ints(-1))
            fc1 = graph.matrix(f"{site}.fc1.by_head", lambda: graph._tensors.array(f"{site}.mlp.fc1.weight").reshape(F, H, d).transpose(1, 2, 0))
            fc1 = graph.op("Reshape", graph.op("Gather", fc1, places, axis=0), graph.ints(-1, F))
            read = graph.op("Reshape", graph.op("Gather", by_head, places, axis=1), graph.ints(0, -1))
            hidden = graph.op("Gemm", read, fc1, bias)
        else:
            hidden = ""
            for group in groups:
                def make(g, group=group, hidden=hidden):
                    read = by_head
                    if len(group) < H:
                        read = g.op("Gather", by_head, g.constant(f"heads_{'_'.join(map(str, group))}", np.array(group, np.int64)), axis=1)
                    read = g.op("Reshape", _mask(g, arch, read, heads, group), g.ints(0, -1))
                    return g.op("Gemm", read, _weights(g, arch, block, group, "fc1"), hidden or bias, transB=1)
                if not hidden:
                    hidden = make(graph)
                else:
                    hidden = _group(graph, arch, heads, group, hidden, make, F)
    hidden = graph.gelu(hidden)
    update = graph.op("Gemm", hidden, graph.weight("", f"{site}.mlp.fc2.weight"), graph.weight("", f"{site}.mlp.fc2.bias"), transB=1)
    return graph.op("Add", update, rows)
