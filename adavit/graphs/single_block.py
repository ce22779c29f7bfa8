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
    """What a block keeps, bool: tokens [1, N], heads [H], attention [1] and MLP [1].

    Each is "" where the block has no such policy.
    """

    tokens: str = ""
    heads: str = ""
    attention: str = ""
    mlp: str = ""


def add_nested_block(
    graph: NestedBuilder, arch: Architecture, block: int, x: str, bounds: Sequence[str], plan: HeadPlan
) -> tuple[str, Kept]:
    """Adds a block to the graph of an image.

    Args:
        graph: where to add.
        arch: the model's shapes.
        block: its position.
        x: the tokens, [N, D].
        bounds: what the logits have to exceed: of tokens, one value, then of heads and sub-layers, one for each; as
            far as the block has policies for them.
        plan: how it runs its heads.

    Returns:
        The tokens behind it, [N, D], and what was kept.
    """
    normed = add_norm(graph, arch, x, f"blocks.{block}.norm1", f"blocks.{block}.norm1")
    kept = _decide(graph, arch, block, x, normed, bounds)

    def run(inner: NestedBuilder) -> str:
        rows, normed_rows, places = x, normed, ""
        if kept.tokens:
            places = places_of(inner, inner.op("Reshape", kept.tokens, inner.ints(-1)))
            rows, normed_rows = (inner.op("Gather", value, places, axis=0) for value in (x, normed))
        heads = kept_heads(inner, arch, kept.heads, plan)
        own = partial(add_attention, arch=arch, block=block, rows=rows, normed=normed_rows, heads=heads, plan=plan)
        some = rows_of(block)
        rows = _where(inner, kept.attention, own, rows, [some, arch.width])
        own = partial(add_mlp, arch=arch, block=block, rows=rows, heads=heads, plan=plan)
        rows = _where(inner, kept.mlp, own, rows, [some, arch.width])
        return inner.op("ScatterND", x, inner.op("Unsqueeze", places, inner.ints(1)), rows) if places else rows

    either = graph.op("Or", kept.attention, kept.mlp) if kept.attention else ""
    return _where(graph, either, run, x, [arch.tokens, arch.width]), kept


def _where(graph: NestedBuilder, condition: str, make: Make, other: str, shape: list[int | str]) -> str:
    """What `make` adds where a condition holds, or there is none; else another value."""
    if not condition:
        return make(graph)
    return graph.branch(condition, make, lambda _: other, ("float32", shape))


def _decide(graph: NestedBuilder, arch: Architecture, block: int, x: str, normed: str, bounds: Sequence[str]) -> Kept:
    """Adds a block's decisions: what is strictly above its bound is kept."""
    site, left = f"blocks.{block}", list(bounds)
    tokens = ""
    if arch.token_policy:
        weight, bias = (graph.weight("", f"{site}.attn.token_select.mlp_head.{kind}") for kind in ("weight", "bias"))
        logits = graph.op("Gemm", weight, normed, bias, transB=1)  # the vector first: half the time
        first = graph.constant("class_token", np.arange(arch.tokens)[None] == 0)
        tokens = graph.op("Or", graph.op("Greater", logits, left.pop(0)), first)
    if not arch.policy_outputs(block):
        return Kept(tokens)
    names = ["head_select"] * arch.adapts_heads(block) + ["layer_select"] * arch.adapts_sublayers(block)
    weight, bias = (_joined(graph, [f"{site}.{name}.mlp_head.{kind}" for name in names]) for kind in ("weight", "bias"))
    first = graph.op("Gather", x, graph.scalar(0, "int64"), axis=0)
    kept = graph.op("Greater", graph.op("Add", graph.op("MatMul", weight, first), bias), left.pop(0))
    if not arch.adapts_sublayers(block):
        return Kept(tokens, kept)
    sizes = [arch.heads] * arch.adapts_heads(block) + [1, 1]
    *heads, attention, mlp = graph.ops("Split", kept, graph.ints(*sizes), outputs=len(sizes), axis=0)
    return Kept(tokens, heads[0] if heads else "", attention, mlp)


def _joined(graph: NestedBuilder, tensors: Sequence[str]) -> str:
    """The rows of some tensors as one weight."""
    return graph.matrix("+".join(tensors), lambda: np.concatenate([graph.tensors.array(name) for name in tensors]))
