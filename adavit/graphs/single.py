"""A whole model as one graph that skips what its policies drop.

    images [B, 3, S, S] and, where asked for, budget [B]
    -> logits [B, C] and, where asked for, tokens [B, L, N], heads [B, L, H], sublayers [B, L, 2], macs [B]

The stem runs on all images, a `Loop` on one after the other. In it, each block decides, and an `If` runs each
sub-layer on the rows of the kept tokens. All weights lie in the outermost graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.onnx_format import TYPES
from adavit.bundle.operating_points import TRAINED, Budgets, Offsets
from adavit.graphs.block import add_norm
from adavit.graphs.nested import NestedBuilder
from adavit.graphs.single_block import Decisions, HeadGroups, add_nested_block
from adavit.graphs.single_policy import add_limits, add_macs
from adavit.graphs.stem import add_stem

__all__ = ["SingleFile", "add_single"]


@dataclass(frozen=True)
class SingleFile:
    """What a single file is to do.

    Attributes:
        groups: how each block runs its heads.
        offsets: of its decisions, where it takes no budget.
        budgets: the operating points, where it takes one.
        with_policy: whether it also tells what it kept.
    """

    groups: Sequence[HeadGroups]
    offsets: Offsets = TRAINED
    budgets: Budgets | None = None
    with_policy: bool = False


def add_single(graph: NestedBuilder, arch: Architecture, single: SingleFile) -> None:
    """Makes a graph the whole model."""
    images = graph.input("images", ["B", 3, arch.image_size, arch.image_size])
    budget = graph.input("budget", ["B"]) if single.budgets else ""
    count = graph.op("Shape", images, start=0, end=1)
    limits = ""
    if single.budgets:
        limits = add_limits(graph, arch, single.budgets, graph.op("Reshape", budget, count))  # [B, 3 L]
    x = add_stem(graph, arch, images)
    body = graph.inside("image")
    for name, dtype in (("image", "int64"), ("go_on", "bool")):
        body._inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], []))
    outputs = [("float32", [arch.classes])]
    if single.with_policy:
        outputs += [("bool", [arch.depth, size]) for size in (arch.tokens, arch.heads, 2)]
    made = _image(body, arch, single, x, limits)
    body.returns([body.op("Identity", "go_on"), *made], [("bool", []), *outputs])
    found = graph.ops("Loop", graph.op("Squeeze", count, graph.ints(0)), "", outputs=len(outputs), body=body.graph()) if len(outputs) > 1 else [graph.op("Loop", graph.op("Squeeze", count, graph.ints(0)), "", body=body.graph())]
    graph.output("logits", found[0], ["B", arch.classes])
    if single.with_policy:
        for name, value, (_, shape) in zip(("tokens", "heads", "sublayers"), found[1:], outputs[1:], strict=True):
            graph.output(name, value, ["B", *shape], "bool")
        graph.output("macs", add_macs(graph, arch, "tokens", "heads", "sublayers"), ["B"], "int64")


def _image(graph: NestedBuilder, arch: Architecture, single: SingleFile, x: str, limits: str) -> list[str]:
    """Runs one image: logits [C] and, where asked for, its masks [L, N], [L, H] and [L, 2]."""
    x = graph.op("Gather", x, "image", axis=0)
    own = graph.op("Gather", limits, "image", axis=0) if limits else ""
    rows = graph.ops("Split", own, outputs=3 * arch.depth, axis=0, num_outputs=3 * arch.depth) if own else []
    kept: list[Decisions] = []
    for block, offsets in enumerate(zip(*single.offsets.by_block(arch.depth), strict=True)):
        if rows:
            bounds = rows[block], rows[arch.depth + block], rows[2 * arch.depth + block]
        else:
            tokens, heads, sublayers = (float(np.float32(value)) for value in offsets)
            values = TOKEN_LOGIT - tokens, -heads, -sublayers
            bounds = tuple(graph.scalar(float(np.float32(value))) for value in values)
        x, decisions = add_nested_block(graph, arch, block, x, bounds, single.groups[block])
        kept.append(decisions)
    logits = _classes(graph, arch, x)
    if not single.with_policy:
        return [logits]
    masks = []
    for kind, size in (("tokens", arch.tokens), ("heads", arch.heads), ("sublayers", 2)):
        found = [getattr(one, kind) or graph.constant(f"every_{size}", np.ones((1, size), bool)) for one in kept]
        masks.append(graph.op("Concat", *found, axis=0))
    return [logits, *masks]


def _classes(graph: NestedBuilder, arch: Architecture, x: str) -> str:
    """The logits [C] of tokens [N, D]: NaN where any token is not finite, which norms would hide."""
    first = graph.op("Slice", x, graph.ints(0), graph.ints(1), graph.ints(0))
    normed = add_norm(graph, arch, first, "norm", "norm")
    logits = graph.op("Gemm", normed, graph.weight("", "head.weight"), graph.weight("", "head.bias"), transB=1)
    zero = graph.op("Mul", graph.op("ReduceSumSquare", x, keepdims=0), graph.scalar(0.0))
    return graph.op("Reshape", graph.op("Add", logits, zero), graph.ints(arch.classes))
