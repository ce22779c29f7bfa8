"""What a batch keeps, in its graphs: which images run a sub-layer, which heads they keep, and packed rows.

A prefix sum gives every kept row its place in a list.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np
from onnx import TensorProto

from adavit.architecture import Architecture
from adavit.bundle.keys import GOES_ON, OVERFLOWED
from adavit.graphs.builder import Builder

__all__ = ["Grid", "Heads", "Policies", "Rows", "first_of", "number", "overflowed"]

MASKED = -1e4
"""Added to the scores of padding keys: what is left of them is 0 in float32 and in float16."""


class Policies:
    """The policies of a batch, as bool.

    Attributes:
        tokens, heads: of each image, [B, N] and [B, H].
        wants: whether it wants a sub-layer, by its name, [B, 1].
        state: of each image, [B].
    """

    def __init__(self, graph: Builder, arch: Architecture) -> None:
        self._graph = graph
        ends = np.cumsum([0, arch.tokens, arch.heads, 1, 1]).tolist()
        kept = graph.input("kept", ["B", ends[-1]], "bool")
        self.state = graph.input("state", ["B"], "int64")
        parts = [
            graph.op("Slice", kept, graph.ints(first), graph.ints(end), graph.ints(1)) for first, end in pairwise(ends)
        ]
        self.tokens, self.heads = parts[:2]
        self.wants = dict(zip(("attention", "mlp"), parts[2:], strict=True))

    def runs(self, sublayer: str, state: str) -> str:
        """Which images run a sub-layer, [B, 1]."""
        goes_on = self._graph.op("Equal", state, number(self._graph, GOES_ON))
        return self._graph.op("And", self.wants[sublayer], self._graph.op("Unsqueeze", goes_on, self._graph.ints(1)))


class Heads:
    """The heads that a graph has, and which of them each image keeps.

    Args:
        graph: where to add.
        policy: what the images keep.

    Attributes:
        numbers: of those that the graph has, [h].
    """

    def __init__(self, graph: Builder, policy: Policies) -> None:
        self._graph, self._policy = graph, policy
        self.numbers = graph.input("heads", ["h"], "int64")
        kept = graph.op("Cast", policy.heads, to=TensorProto.INT64)
        self._there = graph.op("Gather", kept, self.numbers, axis=1)
        wanted, found = (graph.op("ReduceSum", value, graph.ints(1)) for value in (kept, self._there))
        self._lacks = graph.op("Greater", wanted, found)

    def missing(self, sublayer: str, state: str) -> str:
        """The states [B], OVERFLOWED for images that want a sub-layer and a head that is not there."""
        lacks = self._graph.op("And", self._lacks, self._policy.wants[sublayer])
        return overflowed(self._graph, state, self._graph.op("Squeeze", lacks, self._graph.ints(1)))

    def masked(self, x: str, images: str, dtype: int) -> str:
        """Channels [T, h, d] of rows, of which what its image does not keep is 0."""
        graph = self._graph
        kept = graph.op("Cast", graph.op("Gather", self._there, images, axis=0), to=dtype)
        return graph.op("Mul", x, graph.op("Unsqueeze", kept, graph.ints(2)))


class Rows:
    """Rows of all images, packed.

    Args:
        graph: where to add.
        arch: the model's shapes.
        tokens: of each image, bool [B, N].
        runs: which images have rows, bool [B, 1].
        numbers: of all rows, [R].
        room: as many as there is room for, [T].

    Attributes:
        runs, numbers: as given.
        places: those of the packed rows: `room`.
        size: how many there are, a scalar.
        list: numbers of the packed rows, [T]; of the spare row where fewer are needed.
        counts, starts: of each image, how many it has, and the place of its first, [B].
    """

    def __init__(self, graph: Builder, arch: Architecture, tokens: str, runs: str, numbers: str, room: str) -> None:
        self._graph, self._arch = graph, arch
        self.runs, self.numbers, self.places, self.size = runs, numbers, room, _size(graph, room)
        selected = graph.op("And", tokens, runs)
        all_rows = graph.op("Slice", numbers, graph.ints(0), graph.ints(-1), graph.ints(0))
        flat = graph.op("Reshape", selected, graph.ints(-1))
        before = _counts_before(graph, flat)
        self.list = _packed(graph, flat, before, all_rows, self.size, _size(graph, flat))
        self.counts = graph.op("ReduceSum", graph.op("Cast", selected, to=TensorProto.INT64), graph.ints(1), keepdims=0)
        by_image = graph.op("Reshape", before, graph.ints(-1, arch.tokens))
        self.starts = graph.op("Gather", by_image, graph.scalar(0, "int64"), axis=1)

    @cached_property
    def images(self) -> str:
        """Whose row it is, [T]."""
        graph = self._graph
        last = graph.op("Sub", _size(graph, self.runs), number(graph, 1))
        return graph.op("Min", graph.op("Div", self.list, number(graph, self._arch.tokens)), last)

    def beyond(self) -> str:
        """Which images have no room for their rows, bool [B]."""
        graph = self._graph
        ends = graph.op("Add", self.starts, self.counts)
        some = graph.op("Greater", self.counts, number(graph, 0))
        return graph.op("And", graph.op("Greater", ends, self.size), some)

    def of(self, x: str) -> str:
        """Gathers them: [R, D] -> [T, D]."""
        return self._graph.op("Gather", x, self.list, axis=0)

    def back(self, x: str, rows: str, name: str | None = None) -> str:
        """Puts them back: x [R, D]."""
        places = self._graph.op("Unsqueeze", self.list, self._graph.ints(1))
        return self._graph.op("ScatterND", x, places, rows, name=name)


class Grid:
    """Packed rows, image by image: those of the images that run, each with room for as many rows.

    Args:
        graph: where to add.
        rows: the packed rows, [T].
        images: as many as there is room for, [A].
        tokens: of each as many as there is room for, [K].

    Attributes:
        places: the packed row of each, [A, K]. Behind an image's last row that comes again.
        padding: what to add to the scores of keys, [A, 1, 1, K]: it hides such rows.
    """

    def __init__(self, graph: Builder, rows: Rows, images: str, tokens: str) -> None:
        self._graph, self._rows = graph, rows
        self._images, self._tokens = _size(graph, images), _size(graph, tokens)
        self._runs = graph.op("Squeeze", rows.runs, graph.ints(1))
        self._ranks = _counts_before(graph, self._runs)
        batch = graph.op("Shape", self._runs, start=0, end=1)
        last = graph.op("Sub", _size(graph, self._runs), number(graph, 1))
        every = graph.op("Min", graph.op("Slice", rows.numbers, graph.ints(0), batch, graph.ints(0)), last)
        which = _packed(graph, self._runs, self._ranks, every, self._images, number(graph, 0))
        first, count = (graph.op("Gather", value, which, axis=0) for value in (rows.starts, rows.counts))
        first, count = (graph.op("Unsqueeze", value, graph.ints(1)) for value in (first, count))
        end = graph.op("Sub", graph.op("Add", first, count), number(graph, 1))
        most = graph.op("Sub", rows.size, number(graph, 1))
        places = graph.op("Min", graph.op("Add", first, tokens), end, most)
        self.places = graph.op("Max", places, number(graph, 0))
        padding = graph.op("Where", graph.op("Less", tokens, count), graph.scalar(0.0), graph.scalar(MASKED))
        self.padding = graph.op("Unsqueeze", graph.op("Unsqueeze", padding, graph.ints(1)), graph.ints(2))

    def back(self, x: str) -> str:
        """Packs rows again: x [A * K, h, d] -> [T, h, d]."""
        graph, rows = self._graph, self._rows
        shifts = graph.op("Sub", graph.op("Mul", self._ranks, self._tokens), rows.starts)
        places = graph.op("Add", rows.places, graph.op("Gather", shifts, rows.images, axis=0))
        most = graph.op("Sub", graph.op("Mul", self._images, self._tokens), number(graph, 1))
        places = graph.op("Max", graph.op("Min", places, most), number(graph, 0))
        return graph.op("Gather", x, places, axis=0)

    def beyond(self) -> str:
        """Which images have no room, bool [B]."""
        graph = self._graph
        no_image = graph.op("And", self._runs, graph.op("Not", graph.op("Less", self._ranks, self._images)))
        too_long = graph.op("Greater", self._rows.counts, self._tokens)
        return graph.op("Or", graph.op("Or", no_image, too_long), self._rows.beyond())


def _counts_before(graph: Builder, selected: str) -> str:
    """How many are selected before each, of a vector of bool."""
    counted = graph.op("Cast", selected, to=TensorProto.INT64)
    return graph.op("CumSum", counted, number(graph, 0), exclusive=1)


def _packed(graph: Builder, selected: str, before: str, numbers: str, room: str, filling: str) -> str:
    """The numbers of what is selected, one after the other, in a list of so much room, filled up."""
    place = graph.op("Where", selected, graph.op("Min", before, room), room)
    size = graph.op("Unsqueeze", graph.op("Add", room, number(graph, 1)), graph.ints(0))
    empty = graph.op("Expand", filling, size)
    found = graph.op("ScatterND", empty, graph.op("Unsqueeze", place, graph.ints(1)), numbers)
    return graph.op("Slice", found, graph.ints(0), graph.ints(-1), graph.ints(0))


def overflowed(graph: Builder, state: str, which: str, name: str | None = None) -> str:
    """The states [B], at least OVERFLOWED for some images, bool [B]."""
    found = graph.op("Where", which, number(graph, OVERFLOWED), number(graph, GOES_ON))
    return graph.op("Max", state, found, name=name)


def _size(graph: Builder, values: str) -> str:
    """The first dimension, a scalar."""
    return graph.op("Squeeze", graph.op("Shape", values, start=0, end=1), graph.ints(0))


def number(graph: Builder, value: int) -> str:
    """A whole number."""
    return graph.scalar(value, "int64")


def first_of(graph: Builder, values: str) -> str:
    """The first of a vector, a vector of one."""
    return graph.op("Slice", values, graph.ints(0), graph.ints(1), graph.ints(0))
