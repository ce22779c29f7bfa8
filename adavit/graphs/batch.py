"""A batch as graphs, one for the stem and one for each block: each image has its own policy, and kept rows alone run.

    images [B, 3, S, S], limits [B, 3]
    -> y [R, D], next_decisions [B, M'], next_kept [B, M], next_state [B], next_sizes [4]

    x [R, D], kept [B, M], state [B], limits [B, 3], numbers [R], attention_rows [T], attention_images [A],
    attention_tokens [K], mlp_rows [U], and the weights of the h heads that the graph has, as a block's graphs take them
    -> y, next_decisions, next_kept, next_state and next_sizes; behind the last block y, logits [B, C] and next_state

R = B * N + 1: the tokens of all images, and one spare row that padding reads and writes. `kept` are tokens [N], heads
[H], attention and MLP, as bool; `next_decisions` are the logits of those that have a policy. `limits` are what logits
of tokens, heads and sub-layers have to exceed. Names with next_ are for the next block; `next_sizes` are what it takes:
T, A, K, U. `numbers` and the four values after it count from 0 on; their sizes say how much room there is, each at
least 1. `state` is GOES_ON; OVERFLOWED for an image for which there was no room, or that wants a head which the graph
does not have; NOT_FINITE where its decisions are made of NaN, infinity or huge numbers. What an image holds that does
not go on is wrong, and takes no more room.

Kept rows of all images are packed: a prefix sum gives every kept row its place in a list. Norms and linear layers run
on packed rows, attention's products on [A, h, K, d], where padding keys are masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise

import numpy as np
from onnx import TensorProto

from adavit.architecture import Architecture
from adavit.bundle.keys import BETWEEN, GOES_ON, NOT_FINITE, OVERFLOWED, STATE_BEHIND, STATE_BETWEEN
from adavit.graphs.block import add_decision_logits, add_head, add_norm, add_update
from adavit.graphs.builder import Builder
from adavit.graphs.precision import Precision
from adavit.graphs.stem import add_stem

__all__ = ["GOES_ON", "NOT_FINITE", "OVERFLOWED", "add_batch_block", "add_batch_stem"]

MASKED = -1e4
"""Added to the scores of padding keys: what is left of them is 0 in float32 and in float16."""
LARGEST = 1e30
"""Of the logits of decisions."""


def add_batch_stem(graph: Builder, arch: Architecture) -> None:
    """Makes a graph the stem's, for a batch."""
    images = graph.input("images", ["B", 3, arch.image_size, arch.image_size])
    limits = graph.input("limits", ["B", 3])
    rows = graph.op("Reshape", add_stem(graph, arch, images), graph.ints(-1, arch.width))
    spare = graph.op("Expand", graph.scalar(0.0), graph.ints(1, arch.width))
    graph.output("y", graph.op("Concat", rows, spare, axis=0), ["R", arch.width])
    batch = graph.op("Shape", images, start=0, end=1)
    _add_decisions(graph, arch, 0, "y", limits, graph.op("Expand", _number(graph, GOES_ON), batch))


def add_batch_block(graph: Builder, arch: Architecture, block: int, precisions: Mapping[str, Precision]) -> None:
    """Makes a graph a block's, for a batch; `precisions` are of its sub-layers, "attention" and "mlp"."""
    last = block + 1 == arch.depth
    x = graph.input("x", ["R", arch.width])
    policy = Policies(graph, arch)
    limits = "" if last else graph.input("limits", ["B", 3])
    numbers = graph.input("numbers", ["R"], "int64")
    heads = Heads(graph, arch, block, policy.heads)
    state = graph.op("Max", policy.state, heads.missing(policy, "attention"))
    rows = Rows(
        graph, arch, policy.selected("attention", state), numbers, graph.input("attention_rows", ["T"], "int64")
    )
    state, x = _attention(graph, arch, block, x, rows, policy, heads, state, precisions["attention"])
    state = graph.op("Max", state, heads.missing(policy, "mlp"))
    rows = Rows(graph, arch, policy.selected("mlp", state), numbers, graph.input("mlp_rows", ["U"], "int64"))
    state, y = _mlp(graph, arch, block, x, rows, heads, state, precisions["mlp"])
    graph.output("y", y, ["R", arch.width])
    if last:
        add_head(graph, arch, _class_tokens(graph, arch, "y"), "B")
        graph.output("next_state", graph.op("Max", state, state), ["B"], "int64")
    else:
        _add_decisions(graph, arch, block + 1, "y", limits, state)


class Policies:
    """The policies of a batch, as 0 and 1.

    Attributes:
        tokens, heads: of each image, [B, N] and [B, H].
        state: of each image, [B].
    """

    def __init__(self, graph: Builder, arch: Architecture) -> None:
        self._graph = graph
        ends = np.cumsum([0, arch.tokens, arch.heads, 1, 1]).tolist()
        kept = graph.input("kept", ["B", ends[-1]], "bool")
        self.state = graph.input("state", ["B"], "int64")
        numbers = graph.op("Cast", kept, to=TensorProto.INT64)
        parts = [
            graph.op("Slice", numbers, graph.ints(first), graph.ints(end), graph.ints(1))
            for first, end in pairwise(ends)
        ]
        self.tokens, self.heads = parts[:2]
        self._runs = dict(zip(("attention", "mlp"), parts[2:], strict=True))

    def runs(self, sublayer: str, state: str) -> str:
        """Which images run a sub-layer, [B, 1]."""
        goes_on = self._graph.op("Equal", state, _number(self._graph, GOES_ON))
        goes_on = self._graph.op("Cast", goes_on, to=TensorProto.INT64)
        return self._graph.op("Mul", self._runs[sublayer], self._graph.op("Unsqueeze", goes_on, self._graph.ints(1)))

    def selected(self, sublayer: str, state: str) -> str:
        """The tokens [B, N] that a sub-layer runs on."""
        return self._graph.op("Mul", self.tokens, self.runs(sublayer, state))

    def wants(self, sublayer: str) -> str:
        """Which images want a sub-layer, [B]."""
        return self._graph.op("Squeeze", self._runs[sublayer], self._graph.ints(1))


class Heads:
    """The heads that a graph has, and which of them each image keeps.

    Args:
        graph: where to add.
        arch: the model's shapes.
        block: its position.
        kept: heads of each image, [B, H].

    Attributes:
        numbers: of those that the graph has, [h].
    """

    def __init__(self, graph: Builder, arch: Architecture, block: int, kept: str) -> None:
        self._graph, self._kept = graph, kept
        self.numbers = graph.input("heads", ["h"], "int64")
        self._there = graph.op("Gather", kept, self.numbers, axis=1)

    def missing(self, policy: Policies, sublayer: str) -> str:
        """OVERFLOWED for images that run a sub-layer and want one that is not there, [B]."""
        graph = self._graph
        wanted, found = (graph.op("ReduceSum", value, graph.ints(1), keepdims=0) for value in (self._kept, self._there))
        lack = graph.op("Min", graph.op("Sub", wanted, found), _number(graph, 1))
        lack = graph.op("Mul", lack, policy.wants(sublayer))
        return graph.op("Mul", lack, _number(graph, OVERFLOWED))

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
        selected: the tokens to pack, [B, N].
        numbers: of all rows, [R].
        room: as many as there is room for, [T].

    Attributes:
        list: numbers of the packed rows, [T]; of the spare row where fewer are needed.
        counts, starts: of each image, how many it has, and the place of its first, [B].
        room: how many there are, a scalar.
    """

    def __init__(self, graph: Builder, arch: Architecture, selected: str, numbers: str, room: str) -> None:
        self._graph = graph
        self.places = room
        self.room = _size(graph, room)
        flat = graph.op("Reshape", selected, graph.ints(-1))
        spare = _size(graph, flat)
        all_rows = graph.op("Slice", numbers, graph.ints(0), graph.ints(-1), graph.ints(0))
        self.list = _packed(graph, flat, all_rows, self.room, spare)
        self._tokens, self._selected = arch.tokens, selected
        self.counts = graph.op("ReduceSum", selected, graph.ints(1), keepdims=0)
        self.starts = graph.op("CumSum", self.counts, _number(graph, 0), exclusive=1)

    @cached_property
    def images(self) -> str:
        """Whose row it is, [T]."""
        graph = self._graph
        last = graph.op("Sub", _size(graph, self._selected), _number(graph, 1))
        return graph.op("Min", graph.op("Div", self.list, _number(graph, self._tokens)), last)

    def overflowed(self) -> str:
        """OVERFLOWED for images without room for their rows, [B]."""
        graph = self._graph
        ends = graph.op("Add", self.starts, self.counts)
        beyond = graph.op(
            "And", graph.op("Greater", ends, self.room), graph.op("Greater", self.counts, _number(graph, 0))
        )
        return graph.op("Mul", graph.op("Cast", beyond, to=TensorProto.INT64), _number(graph, OVERFLOWED))

    def of(self, x: str) -> str:
        """Gathers them: [R, D] -> [T, D]."""
        return self._graph.op("Gather", x, self.list, axis=0)

    def back(self, x: str, rows: str, name: str | None = None) -> str:
        """Puts them back: x [R, D]."""
        places = self._graph.op("Unsqueeze", self.list, self._graph.ints(1))
        return self._graph.op("ScatterND", x, places, rows, name=name)


def _attention(
    graph: Builder,
    arch: Architecture,
    block: int,
    x: str,
    rows: Rows,
    policy: Policies,
    heads: Heads,
    state: str,
    precision: Precision,
) -> tuple[str, str]:
    """The attention sub-layer: state [B] and x [R, D] behind it."""
    site, d = f"blocks.{block}", arch.head_width
    weights = {"qkv": graph.input("qkv", ["3c", arch.width], precision.dtype)}
    if arch.qkv_bias:
        weights["bias"] = graph.input("qkv_bias", ["3c"], precision.dtype)
    weights["proj"] = graph.input("proj", [arch.width, "c"], precision.dtype)
    room_images = graph.input("attention_images", ["A"], "int64")
    room_tokens = graph.input("attention_tokens", ["K"], "int64")

    before = rows.of(x)
    normed = add_norm(graph, arch, before, "norm1", f"{site}.norm1", "qkv.input")
    qkv = graph.op("Gemm", precision.enter(graph, normed, f"{site}.qkv"), weights["qkv"], transB=1)
    if "bias" in weights:
        qkv = graph.op("Add", qkv, weights["bias"])
    parts = graph.op("Reshape", qkv, graph.ints(0, 3, -1, d))  # [T, 3, h, d]

    # Rows of the images that run attention, [A, K], as places among the packed rows.
    runs = graph.op("Squeeze", policy.runs("attention", state), graph.ints(1))
    ranks = graph.op("CumSum", runs, _number(graph, 0), exclusive=1)
    size_images, size_tokens = _size(graph, room_images), _size(graph, room_tokens)
    all_images = graph.op("CumSum", _ones(graph, runs), _number(graph, 0), exclusive=1)
    images = _packed(graph, runs, all_images, size_images, _number(graph, 0))
    first, count = (graph.op("Gather", value, images, axis=0) for value in (rows.starts, rows.counts))
    first, count = (graph.op("Unsqueeze", value, graph.ints(1)) for value in (first, count))
    # Padding keys are the image's own last row: masked, its share is 0, whatever the row holds.
    end = graph.op("Sub", graph.op("Add", first, count), _number(graph, 1))
    beyond = graph.op("Sub", rows.room, _number(graph, 1))
    places = graph.op("Min", graph.op("Add", first, room_tokens), end, beyond)
    places = graph.op("Max", places, _number(graph, 0))
    dtype = TensorProto.FLOAT16 if precision.name == "fp16" else TensorProto.FLOAT
    padding = graph.op("Cast", graph.op("Not", graph.op("Less", room_tokens, count)), to=TensorProto.FLOAT)
    padding = graph.op("Mul", padding, graph.scalar(MASKED))
    padding = graph.op("Unsqueeze", graph.op("Unsqueeze", padding, graph.ints(1)), graph.ints(2))  # [A, 1, 1, K]

    query, key, value = (
        graph.op(
            "Transpose",
            graph.op("Gather", graph.op("Gather", parts, graph.scalar(i, "int64"), axis=1), places, axis=0),
            perm=perm,
        )
        for i, perm in enumerate(([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
    )  # [A, h, K, d]
    scores = precision.leave(graph, graph.op("MatMul", query, key))
    shares = precision.enter(graph, graph.op("Softmax", graph.op("Add", scores, padding), axis=-1))
    mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])  # [A, K, h, d]
    mixed = graph.op("Reshape", mixed, graph.op("Concat", graph.ints(-1), graph.op("Shape", mixed, start=2), axis=0))

    # From [A * K, h, d] to packed rows.
    own = graph.op("Sub", rows.places, graph.op("Gather", rows.starts, rows.images, axis=0))
    most = graph.op("Sub", size_tokens, _number(graph, 1))
    own = graph.op("Max", graph.op("Min", own, most), _number(graph, 0))
    rank = graph.op(
        "Min", graph.op("Gather", ranks, rows.images, axis=0), graph.op("Sub", size_images, _number(graph, 1))
    )
    mixed = graph.op("Gather", mixed, graph.op("Add", graph.op("Mul", rank, size_tokens), own), axis=0)
    mixed = graph.op("Reshape", heads.masked(mixed, rows.images, dtype), graph.ints(0, -1), name="mixed")
    after = add_update(graph, block, "attn", "proj", mixed, weights["proj"], before, precision, "")

    no_image = graph.op("Greater", graph.op("Add", ranks, runs), size_images)
    too_long = graph.op("Greater", rows.counts, size_tokens)
    lacks = graph.op("Cast", graph.op("Or", no_image, too_long), to=TensorProto.INT64)
    lacks = graph.op("Mul", graph.op("Mul", lacks, runs), _number(graph, OVERFLOWED))
    state = graph.op("Max", state, rows.overflowed(), lacks, name=STATE_BETWEEN)
    return state, rows.back(x, after, BETWEEN)


def _mlp(
    graph: Builder, arch: Architecture, block: int, x: str, rows: Rows, heads: Heads, state: str, precision: Precision
) -> tuple[str, str]:
    """The MLP sub-layer: state [B] and x [R, D] behind it."""
    site, adapts = f"blocks.{block}", arch.adapts_heads(block)
    fc1 = graph.input("fc1", [arch.hidden, "c" if adapts else arch.width], precision.dtype)
    fc2 = graph.input("fc2", [arch.width, arch.hidden], precision.dtype)
    before = rows.of(x)
    normed = add_norm(graph, arch, before, "norm2", f"{site}.norm2", None if adapts else "fc1.input")
    if adapts:
        by_head = graph.op("Reshape", normed, graph.ints(0, arch.heads, arch.head_width))
        by_head = graph.op("Gather", by_head, heads.numbers, axis=1)
        by_head = heads.masked(by_head, rows.images, TensorProto.FLOAT)
        normed = graph.op("Reshape", by_head, graph.ints(0, -1), name="fc1.input")
    hidden = graph.op("Gemm", precision.enter(graph, normed, f"{site}.fc1"), fc1, transB=1)
    hidden = graph.op("Add", hidden, graph.weight("mlp.fc1.bias", f"{site}.mlp.fc1.bias"))
    hidden = graph.gelu(hidden, "fc2.input", precision.dtype)
    after = add_update(graph, block, "mlp", "fc2", hidden, fc2, before, precision, "")
    return graph.op("Max", state, rows.overflowed(), name=STATE_BEHIND), rows.back(x, after)


def _add_decisions(graph: Builder, arch: Architecture, block: int, y: str, limits: str, state: str) -> None:
    """Adds a block's decisions on y [R, D]: the outputs kept, state and sizes."""
    rows = graph.op("Slice", y, graph.ints(0), graph.ints(-1), graph.ints(0))
    logits = add_decision_logits(graph, arch, block, rows, lambda: _class_tokens(graph, arch, y))
    sizes = {"tokens": arch.tokens, "heads": arch.heads, "sublayers": 2}
    parts, made = [], []
    for column, (kind, size) in enumerate(sizes.items()):
        if kind not in logits:
            shape = graph.op("Concat", graph.op("Shape", limits, start=0, end=1), graph.ints(size), axis=0)
            parts.append(graph.op("Expand", graph.constant("true", np.array([[True]])), shape))
            continue
        found = graph.op("Reshape", logits[kind], graph.ints(-1, size))
        limit = graph.op("Slice", limits, graph.ints(column), graph.ints(column + 1), graph.ints(1))
        parts.append(graph.op("Greater", found, limit))
        made.append(found)
    if arch.token_policy:
        parts[0] = graph.op("Or", parts[0], graph.constant("class_token", np.arange(arch.tokens)[None] == 0))
    kept = graph.op("Concat", *parts, axis=1)
    if made:
        decisions = graph.op("Concat", *made, axis=1) if len(made) > 1 else made[0]
        count = arch.tokens * arch.token_policy + arch.policy_outputs(block)
        graph.output("next_decisions", decisions, ["B", count])
        # Each is compared by itself: a maximum may lose NaN.
        huge = graph.op("Not", graph.op("Less", graph.op("Abs", "next_decisions"), graph.scalar(LARGEST)))
        huge = graph.op("ReduceSum", graph.op("Cast", huge, to=TensorProto.INT64), graph.ints(1), keepdims=0)
        huge = graph.op("Cast", graph.op("Greater", huge, _number(graph, 0)), to=TensorProto.INT64)
        state = graph.op("Max", state, graph.op("Mul", huge, _number(graph, NOT_FINITE)))
    graph.output("next_kept", kept, ["B", sum(sizes.values())], "bool")
    graph.output("next_state", graph.op("Max", state, state) if not made else state, ["B"], "int64")
    goes_on = graph.op("Cast", graph.op("Equal", "next_state", _number(graph, GOES_ON)), to=TensorProto.INT64)
    goes_on = graph.op("Unsqueeze", goes_on, graph.ints(1))
    tokens = graph.op("Cast", parts[0], to=TensorProto.INT64)
    tokens = graph.op("ReduceSum", tokens, graph.ints(1), keepdims=1)
    runs = graph.op("Mul", graph.op("Cast", parts[2], to=TensorProto.INT64), goes_on)  # [B, 2]
    each = graph.op("Mul", runs, tokens)
    sums = graph.op("ReduceSum", each, graph.ints(0), keepdims=0)
    images = _first(graph, graph.op("ReduceSum", runs, graph.ints(0), keepdims=0))
    attending = graph.op("Slice", each, graph.ints(0), graph.ints(1), graph.ints(1))
    longest = graph.op("Unsqueeze", graph.op("ReduceMax", attending, keepdims=0), graph.ints(0))
    mlp = graph.op("Slice", sums, graph.ints(1), graph.ints(2), graph.ints(0))
    found = graph.op("Concat", _first(graph, sums), images, longest, mlp, axis=0)
    graph.output("next_sizes", found, [4], "int64")


def _class_tokens(graph: Builder, arch: Architecture, y: str) -> str:
    """The class tokens [B, D] of rows [R, D]."""
    rows = graph.op("Slice", y, graph.ints(0), graph.ints(-1), graph.ints(0))
    by_image = graph.op("Reshape", rows, graph.ints(-1, arch.tokens, arch.width))
    classes = graph.op("Gather", by_image, graph.scalar(0, "int64"), axis=1)
    # TensorRT-RTX 1.7 does not build a product of one row that it reads from ScatterND's output: this is a copy.
    copied = graph.op("Concat", classes, _first(graph, classes), axis=0)
    return graph.op("Slice", copied, graph.ints(0), graph.ints(-1), graph.ints(0))


def _packed(graph: Builder, selected: str, numbers: str, room: str, filling: str) -> str:
    """The numbers of what is selected (0 or 1), one after the other, in a list of so much room, filled up."""
    before = graph.op("CumSum", selected, _number(graph, 0), exclusive=1)
    is_selected = graph.op("Greater", selected, _number(graph, 0))
    place = graph.op("Where", is_selected, graph.op("Min", before, room), room)
    size = graph.op("Unsqueeze", graph.op("Add", room, _number(graph, 1)), graph.ints(0))
    empty = graph.op("Expand", filling, size)
    found = graph.op("ScatterND", empty, graph.op("Unsqueeze", place, graph.ints(1)), numbers)
    return graph.op("Slice", found, graph.ints(0), graph.ints(-1), graph.ints(0))


def _first(graph: Builder, values: str) -> str:
    """The first of a vector, a vector of one."""
    return graph.op("Slice", values, graph.ints(0), graph.ints(1), graph.ints(0))


def _size(graph: Builder, values: str) -> str:
    """The first dimension, a scalar."""
    return graph.op("Squeeze", graph.op("Shape", values, start=0, end=1), graph.ints(0))


def _ones(graph: Builder, values: str) -> str:
    return graph.op("Add", graph.op("Mul", values, _number(graph, 0)), _number(graph, 1))


def _number(graph: Builder, value: int) -> str:
    return graph.scalar(value, "int64")
