"""A block of a single file: it decides, and an `If` runs each sub-layer on the rows of the kept tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from adavit.architecture import Architecture
from adavit.graphs.block import add_norm
from adavit.graphs.nested import NestedBuilder
from adavit.graphs.single_heads import places_of
from adavit.graphs.single_sublayers import HeadPlan, add_attention, add_mlp, kept_heads, rows_of

__all__ = ["Kept", "add_nested_block"]

Make = Callable[[NestedBuilder], str]


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
        heads = kept_heads(inner, arch, kept.heads, plan)
        own = partial(add_attention, arch=arch, block=block, rows=rows, normed=normed_rows, heads=heads, plan=plan)
        some = rows_of(block)
        rows = _where(inner, runs[0], own, rows, [some, arch.width])
        own = partial(add_mlp, arch=arch, block=block, rows=rows, heads=heads, plan=plan)
        rows = _where(inner, runs[1], own, rows, [some, arch.width])
        return inner.op("ScatterND", x, inner.op("Unsqueeze", places, inner.ints(1)), rows) if places else rows

    if not kept.sublayers:
        return run(graph), kept
    return _where(graph, graph.op("Or", *runs), run, x, [arch.tokens, arch.width]), kept


def _where(graph: NestedBuilder, condition: str, make: Make, other: str, shape: list[int | str]) -> str:
    """What `make` adds where a condition holds, or there is none; else another value."""
    if not condition:
        return make(graph)
    return graph.branch(condition, make, lambda _: other, ("float32", shape))


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
