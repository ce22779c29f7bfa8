"""The sub-layers of a single file, on the rows of the kept tokens and for the kept heads.

Where nearly all heads are kept, all of them run, and a mask takes away what dropped ones made. Elsewhere the weights
of the kept heads are gathered. Frequent head sets may have constant weights of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from adavit.architecture import Architecture
from adavit.graphs.block import add_norm
from adavit.graphs.nested import Made, NestedBuilder
from adavit.graphs.single_heads import Heads, HeadSet, every_head, places_of

__all__ = ["HeadPlan", "KeptHeads", "add_attention", "add_mlp", "kept_heads", "rows_of"]


Make = Callable[[NestedBuilder], str]
"""Adds a value to a graph."""


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


class KeptHeads(NamedTuple):
    """The kept heads of a block.

    Attributes:
        channels: 1 or 0 for each channel, [D], where dropped heads are masked, else "".
        places: their numbers, int64 [h], where their weights are gathered, else "".
        number: the set as one number, int64 []: bit i is head i. "" where no set has constant weights.
    """

    channels: str = ""
    places: str = ""
    number: str = ""


def rows_of(block: int) -> str:
    """The name of a block's number of kept tokens: where two had one name, ONNX Runtime would share their memory."""
    return f"K{block}"


def kept_heads(graph: NestedBuilder, arch: Architecture, mask: str, plan: HeadPlan) -> KeptHeads:
    """Adds what the sub-layers need to know of the kept heads; `mask` is "" where a block always keeps all."""
    if not mask:
        return KeptHeads()
    if plan.masked:
        head_of = graph.constant("head_of_channel", np.repeat(np.arange(arch.heads), arch.head_width))
        return KeptHeads(graph.op("Gather", graph.op("Cast", mask, to=TensorProto.FLOAT), head_of, axis=0))
    number = ""
    if plan.attention or plan.mlp:
        powers = graph.constant("powers_of_two", 2 ** np.arange(arch.heads, dtype=np.int64))
        bits = graph.op("Cast", mask, to=TensorProto.INT64)
        number = graph.op("ReduceSum", graph.op("Mul", bits, powers), keepdims=0)
    return KeptHeads("", places_of(graph, mask), number)


def add_attention(
    graph: NestedBuilder, arch: Architecture, block: int, rows: str, normed: str, heads: KeptHeads, plan: HeadPlan
) -> str:
    """The attention sub-layer, residual included: rows [K, D] -> [K, D]; `normed` is norm1 of them."""
    own, bias = Heads(arch, block), graph.weight("", f"blocks.{block}.attn.proj.bias")

    def constant(g: NestedBuilder, which: HeadSet) -> str:
        mixed = own.fused(g, normed, which) if plan.fused else own.attend(g, normed, which)
        return own.linear(g, _masked(g, mixed, heads), "proj", which, bias)

    def gathered(g: NestedBuilder) -> str:
        return g.op("Gemm", own.attend_gathered(g, normed, heads.places), own.proj_gathered(g, heads.places), bias)

    if heads.places:
        alone = _Bias(bias, rows, block, arch.width)
        update = _among(graph, heads, plan.attention, constant, gathered, alone)
    else:
        update = constant(graph, every_head(arch))
    return graph.op("Add", update, rows)


def add_mlp(graph: NestedBuilder, arch: Architecture, block: int, rows: str, heads: KeptHeads, plan: HeadPlan) -> str:
    """The MLP sub-layer, residual included: rows [K, D] -> [K, D]."""
    own, site = Heads(arch, block), f"blocks.{block}"
    normed = add_norm(graph, arch, rows, f"{site}.norm2", f"{site}.norm2")
    bias = graph.weight("", f"{site}.mlp.fc1.bias")
    if heads.places:
        by_head = graph.op("Reshape", normed, graph.ints(0, arch.heads, arch.head_width))

        def read(g: NestedBuilder, places: str) -> str:
            return g.op("Reshape", g.op("Gather", by_head, places, axis=1), g.ints(0, -1))

        def constant(g: NestedBuilder, which: HeadSet) -> str:
            return own.linear(g, read(g, g.ints(*which)), "fc1", which, bias)

        def gathered(g: NestedBuilder) -> str:
            return g.op("Gemm", read(g, heads.places), own.fc1_gathered(g, heads.places), bias)

        hidden = _among(graph, heads, plan.mlp, constant, gathered, _Bias(bias, rows, block, arch.hidden))
    else:
        hidden = own.linear(graph, _masked(graph, normed, heads), "fc1", every_head(arch), bias)
    bias = graph.weight("", f"{site}.mlp.fc2.bias")
    return graph.op("Add", own.linear(graph, graph.gelu(hidden), "fc2", every_head(arch), bias), rows)


class _Bias(NamedTuple):
    """What a linear layer makes where no head is kept: its bias in each of the rows."""

    value: str
    rows: str
    block: int
    width: int

    @property
    def made(self) -> Made:
        """What a linear layer makes in any case."""
        return "float32", [rows_of(self.block), self.width]

    def add(self, graph: NestedBuilder) -> str:
        """Adds it to a graph."""
        count = graph.op("Shape", self.rows, start=0, end=1)
        return graph.op("Expand", self.value, graph.op("Concat", count, graph.ints(self.width), axis=0))


def _among(
    graph: NestedBuilder,
    heads: KeptHeads,
    sets: Sequence[HeadSet],
    constant: Callable[..., str],
    gathered: Make,
    alone: _Bias,
) -> str:
    """What a linear layer makes of the kept heads: [K, out].

    With constants where they are one of some sets, else with what is gathered, and with its bias alone where there is
    none. Engines multiply by no column at all in different ways.
    """

    def choose(g: NestedBuilder, left: Sequence[HeadSet]) -> str:
        if left:
            same = g.op("Equal", heads.number, g.scalar(sum(2**head for head in left[0]), "int64"))
            return g.branch(
                same, lambda inner: constant(inner, left[0]), lambda inner: choose(inner, left[1:]), alone.made
            )
        some = g.op("Greater", g.op("Size", heads.places), g.scalar(0, "int64"))
        return g.branch(some, gathered, alone.add, alone.made)

    return choose(graph, sets)


def _masked(graph: NestedBuilder, values: str, heads: KeptHeads) -> str:
    """values [K, D] with the channels of dropped heads at 0, where these are masked."""
    return graph.op("Mul", values, heads.channels) if heads.channels else values
