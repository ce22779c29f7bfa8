"""A whole model as one graph that skips what its policies drop.

    images [B, 3, S, S] and, where asked for, budget [B]
    -> logits [B, C] and, where asked for, tokens [B, L, N], heads [B, L, H], sublayers [B, L, 2], macs [B]

The stem runs on all images. A `Loop` then takes one image after the other. In it, each block decides, and an `If` runs
each sub-layer on the rows of the kept tokens. A model without policies is its dense graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.operating_points import TRAINED, Budgets, Offsets
from adavit.graphs.block import add_norm
from adavit.graphs.dense import make_dense
from adavit.graphs.nested import Made, NestedBuilder
from adavit.graphs.precision import Units
from adavit.graphs.single_block import Kept, add_nested_block
from adavit.graphs.single_policy import add_limits, add_macs, limits_of
from adavit.graphs.single_sublayers import HeadPlan
from adavit.graphs.stem import add_stem

__all__ = ["SingleGraph", "make_single"]


@dataclass(frozen=True)
class SingleGraph:
    """What the graph is to do.

    Attributes:
        plans: how each block runs its heads.
        offsets: of the decision logits, where it takes no budget.
        budgets: the operating points, where it takes one.
        with_policy: whether it also tells what it kept.
    """

    plans: Sequence[HeadPlan]
    offsets: Offsets = TRAINED
    budgets: Budgets | None = None
    with_policy: bool = False


def make_single(graph: NestedBuilder, arch: Architecture, asked: SingleGraph) -> None:
    """Makes a graph the whole model."""
    if not arch.adapts:
        make_dense(graph, arch, Units())
        return
    images = graph.input("images", ["B", 3, arch.image_size, arch.image_size])
    count = graph.op("Shape", images, start=0, end=1)
    limits = ""
    if asked.budgets:
        # The reshape refuses another number of budgets than images.
        budget = graph.op("Reshape", graph.input("budget", ["B"]), count)
        limits = add_limits(graph, arch, asked.budgets, budget)
    tokens = add_stem(graph, arch, images)
    masks = {"tokens": arch.tokens, "heads": arch.heads, "sublayers": 2} if asked.with_policy else {}
    made: list[Made] = [("float32", [arch.classes])]
    made += [("bool", [arch.depth, size]) for size in masks.values()]
    made += [("int64", [])] * asked.with_policy

    def image(body: NestedBuilder, number: str) -> list[str]:
        x = body.op("Gather", tokens, number, axis=0)
        return _image(body, arch, asked, x, body.op("Gather", limits, number, axis=0) if limits else "")

    found = graph.loop(graph.op("Squeeze", count, graph.ints(0)), image, made)
    graph.output("logits", found[0], ["B", arch.classes])
    for (name, size), value in zip(masks.items(), found[1:-1], strict=True):
        graph.output(name, value, ["B", arch.depth, size], "bool")
    if asked.with_policy:
        graph.output("macs", found[-1], ["B"], "int64")


def _image(graph: NestedBuilder, arch: Architecture, asked: SingleGraph, x: str, limits: str) -> list[str]:
    """Runs one image: tokens [N, D] -> logits [C] and, where asked for, masks [L, N], [L, H], [L, 2] and MACs []."""
    offsets = np.array(asked.offsets.by_block(arch.depth))
    bounds = limits_of(arch, np.array([[TOKEN_LOGIT], [0.0], [0.0]]) - offsets)
    sizes = [len(part) for parts in bounds for part in parts]
    split = iter(graph.ops("Split", limits, graph.ints(*sizes), outputs=len(sizes), axis=0)) if limits else None
    kept: list[Kept] = []
    for block, parts in enumerate(bounds):
        own = [next(split) if split else graph.constant(f"limits.{block}.{i}", part) for i, part in enumerate(parts)]
        x, found = add_nested_block(graph, arch, block, x, own, asked.plans[block])
        kept.append(found)
    masks = _masks(graph, arch, kept) if asked.with_policy else []
    return [_classes(graph, arch, x), *masks]


def _classes(graph: NestedBuilder, arch: Architecture, x: str) -> str:
    """The logits [C] of tokens [N, D]: NaN where a norm's sum of squares would not be finite, which hides it."""
    first = graph.op("Slice", x, graph.ints(0), graph.ints(1), graph.ints(0))
    normed = add_norm(graph, arch, first, "norm", "norm")
    weight, bias = (graph.weight(f"head.{kind}", f"head.{kind}") for kind in ("weight", "bias"))
    logits = graph.op("Gemm", normed, weight, bias, transB=1)
    nothing = graph.op("Mul", graph.op("ReduceSumSquare", x, keepdims=0), graph.scalar(0.0))
    return graph.op("Reshape", graph.op("Add", logits, nothing), graph.ints(arch.classes))


def _masks(graph: NestedBuilder, arch: Architecture, kept: Sequence[Kept]) -> list[str]:
    """What an image kept: masks [L, N], [L, H] and [L, 2], and its MACs []."""

    def rows(masks: Sequence[str], size: int, shape: Sequence[int]) -> str:
        every = [mask or graph.constant(f"every_{'_'.join(map(str, shape))}", np.ones(shape, bool)) for mask in masks]
        joined = graph.op("Concat", *every, axis=0)
        return joined if len(shape) > 1 else graph.op("Reshape", joined, graph.ints(arch.depth, size))

    flags = [flag for one in kept for flag in (one.attention, one.mlp)]
    masks = [
        rows([one.tokens for one in kept], arch.tokens, (1, arch.tokens)),
        rows([one.heads for one in kept], arch.heads, (arch.heads,)),
        rows(flags, 2, (1,)),
    ]
    return [*masks, add_macs(graph, arch, *masks)]
