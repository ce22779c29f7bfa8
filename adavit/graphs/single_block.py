"""A block of a single file: it decides, and an `If` runs each sub-layer on the rows of the kept tokens.

Where nearly all heads are kept, all of them run, and a mask takes away what dropped ones made. Elsewhere the weights
of the kept heads are gathered. Their layouts have the heads first, so that a head's weights are one piece of memory:
qkv [H, D, 3d], proj [H, d, D] and fc1 [H, d, F]. Frequent head sets may have constant weights of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from adavit.architecture import Architecture
from adavit.graphs.block import add_norm
from adavit.graphs.nested import Made, NestedBuilder
from adavit.graphs.single_heads import Heads, HeadSet, every_head, places_of

__all__ = ["HeadPlan", "Kept", "add_nested_block"]

Make = Callable[[NestedBuilder], str]


@dataclass(frozen=True)
class HeadPlan:
    """How a block runs its heads.

    Attributes:
        masked: whether all heads run, and dropped ones are masked; else their weights are gathered.
        attention, mlp: sets of heads whose weights are also there as constants.
        fused: whether attention on constant weights is ONNX Runtime's own operator.
    """

    masked: bool = False
    attention: tuple[HeadSet, ...] = ()
    mlp: tuple[HeadSet, ...] = ()
    fused: bool = False


class Kept(NamedTuple):
    """The masks of a block, bool: tokens [1, N], heads [1, H], sublayers [1, 2]; "" where it has no such policy."""

    tokens: str
    heads: str
    sublayers: str


def add_nested_block(
    graph: NestedBuilder, arch: Architecture, block: int, x: str, bounds: Sequence[str], plan: HeadPlan
) -> tuple[str, Kept]:
    """Adds a block to the graph of an image.

    Args:
        graph: where to add.
        arch: the model's shapes.
        block: its position.
        x: the tokens, [N, D].
        bounds: what the logits of tokens, heads and sub-layers have to exceed.
        plan: how it runs its heads.

    Returns:
        The tokens behind it, [N, D], and what was kept.
    """
    normed = add_norm(graph, arch, x, f"blocks.{block}.norm1", f"blocks.{block}.norm1")
    kept = _decide(graph, arch, block, x, normed, bounds)
    runs = ["", ""]
    if kept.sublayers:
        flags = graph.op("Reshape", kept.sublayers, graph.ints(2))
        runs = [graph.op("Gather", flags, graph.constant(f"part_{i}", np.int64(i)), axis=0) for i in (0, 1)]

    def run(inner: NestedBuilder) -> str:
        rows, normed_rows, places = x, normed, ""
        if kept.tokens:
            places = places_of(inner, kept.tokens)
            rows, normed_rows = (inner.op("Gather", value, places, axis=0) for value in (x, normed))
        own = partial(_attention, arch=arch, block=block, rows=rows, normed=normed_rows, kept=kept, plan=plan)
        rows = _where(inner, runs[0], own, rows, "K")
        own = partial(_mlp, arch=arch, block=block, rows=rows, kept=kept, plan=plan)
        rows = _where(inner, runs[1], own, rows, "K")
        return inner.op("ScatterND", x, inner.op("Unsqueeze", places, inner.ints(1)), rows) if places else rows

    if not kept.sublayers:
        return run(graph), kept
    return _where(graph, graph.op("Or", *runs), run, x, arch.tokens, arch.width), kept


def _where(graph: NestedBuilder, condition: str, make: Make, other: str, rows: int | str, width: int = 0) -> str:
    """What `make` adds where a condition holds, or there is none; else another value."""
    if not condition:
        return make(graph)
    return graph.branch(condition, make, lambda _: other, ("float32", [rows, width or "D"]))


def _decide(graph: NestedBuilder, arch: Architecture, block: int, x: str, normed: str, bounds: Sequence[str]) -> Kept:
    """Adds a block's decisions: what is strictly above its bound is kept."""
    site = f"blocks.{block}"

    def chosen(bound: str, name: str, *read: str, vector_first: bool = False) -> str:
        weight, bias = (graph.weight("", f"{site}.{name}.mlp_head.{kind}") for kind in ("weight", "bias"))
        factors = (weight, *read) if vector_first else (*read, weight)
        return graph.op("Greater", graph.op("Gemm", *factors, bias, transB=1), bound)

    tokens = heads = sublayers = ""
    if arch.token_policy:
        first = graph.constant("class_token", np.arange(arch.tokens)[None] == 0)
        tokens = graph.op("Or", chosen(bounds[0], "attn.token_select", normed, vector_first=True), first)
    if arch.policy_outputs(block):
        row = graph.op("Slice", x, graph.ints(0), graph.ints(1), graph.ints(0))
        heads = chosen(bounds[1], "head_select", row) if arch.adapts_heads(block) else ""
        sublayers = chosen(bounds[2], "layer_select", row) if arch.adapts_sublayers(block) else ""
    return Kept(tokens, heads, sublayers)


def _attention(
    graph: NestedBuilder, arch: Architecture, block: int, rows: str, normed: str, kept: Kept, plan: HeadPlan
) -> str:
    """The attention sub-layer on kept rows, residual included: [K, D] -> [K, D]."""
    heads = Heads(arch, block)
    bias = graph.weight("", f"blocks.{block}.attn.proj.bias")

    def update(mixed: str, g: NestedBuilder, weight: str) -> str:
        return g.op("Add", g.op("Gemm", mixed, weight, bias), rows)

    def constant(g: NestedBuilder, which: HeadSet, mask: str = "") -> str:
        mixed = heads.fused(g, normed, which) if plan.fused else heads.attend(g, normed, heads.qkv(g, which), which)
        return update(_masked(g, arch, mixed, mask), g, heads.proj(g, which))

    def gathered(g: NestedBuilder) -> str:
        places = places_of(g, kept.heads)
        return update(heads.attend_gathered(g, normed, places), g, heads.proj_gathered(g, places))

    if not kept.heads or plan.masked:
        return constant(graph, every_head(arch), kept.heads)  # with the mask of dropped ones
    return _among(graph, kept.heads, every_head(arch), plan.attention, constant, gathered, arch.width)


def _mlp(graph: NestedBuilder, arch: Architecture, block: int, rows: str, kept: Kept, plan: HeadPlan) -> str:
    """The MLP sub-layer on kept rows, residual included: [K, D] -> [K, D]."""
    heads, site = Heads(arch, block), f"blocks.{block}"
    normed = add_norm(graph, arch, rows, f"{site}.norm2", f"{site}.norm2")
    bias = graph.weight("", f"{site}.mlp.fc1.bias")
    if not kept.heads or plan.masked:
        read = _masked(graph, arch, normed, kept.heads)
        hidden = graph.op("Gemm", read, heads.fc1(graph, every_head(arch)), bias)
    else:
        by_head = graph.op("Reshape", normed, graph.ints(0, arch.heads, arch.head_width))

        def read_of(g: NestedBuilder, places: str) -> str:
            return g.op("Reshape", g.op("Gather", by_head, places, axis=1), g.ints(0, -1))

        def constant(g: NestedBuilder, which: HeadSet) -> str:
            return g.op("Gemm", read_of(g, g.ints(*which)), heads.fc1(g, which), bias)

        def gathered(g: NestedBuilder) -> str:
            places = places_of(g, kept.heads)
            return g.op("Gemm", read_of(g, places), heads.fc1_gathered(g, places), bias)

        hidden = _among(graph, kept.heads, every_head(arch), plan.mlp, constant, gathered, arch.hidden)
    weight, bias = (graph.weight("", f"{site}.mlp.fc2.{kind}") for kind in ("weight", "bias"))
    return graph.op("Add", graph.op("Gemm", graph.gelu(hidden), weight, bias, transB=1), rows)


def _among(
    graph: NestedBuilder,
    kept: str,
    every: HeadSet,
    sets: Sequence[HeadSet],
    constant: Callable[[NestedBuilder, HeadSet], str],
    other: Make,
    width: int,
) -> str:
    """What is made for the kept heads [1, H]: with constants where they are one of some sets, else by `other`."""
    if not sets:
        return other(graph)
    powers = graph.constant("powers_of_two", 2 ** np.arange(len(every), dtype=np.int64))
    number = graph.op("Mul", graph.op("Cast", graph.op("Reshape", kept, graph.ints(-1)), to=TensorProto.INT64), powers)
    number = graph.op("ReduceSum", number, keepdims=0)  # the set as one number: bit i is head i

    def choose(g: NestedBuilder, left: Sequence[HeadSet]) -> str:
        if not left:
            return other(g)
        same = g.op("Equal", number, g.scalar(sum(2**head for head in left[0]), "int64"))
        made: Made = ("float32", ["K", width])
        return g.branch(same, lambda inner: constant(inner, left[0]), lambda inner: choose(inner, left[1:]), made)

    return choose(graph, sets)


def _masked(graph: NestedBuilder, arch: Architecture, values: str, mask: str) -> str:
    """values [K, D] with the channels of dropped heads at 0."""
    if not mask:
        return values
    by_head = graph.op("Reshape", values, graph.ints(0, arch.heads, arch.head_width))
    factor = graph.op("Cast", graph.op("Reshape", mask, graph.ints(-1, 1)), to=TensorProto.FLOAT)
    return graph.op("Reshape", graph.op("Mul", by_head, factor), graph.ints(0, -1))
