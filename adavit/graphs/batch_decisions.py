"""The decisions of a batch's graphs: what the next block keeps, of which images, and the room that takes."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from adavit.architecture import Architecture
from adavit.bundle.keys import GOES_ON, NOT_FINITE
from adavit.graphs.batch_rows import first_of, number
from adavit.graphs.block import add_decision_logits
from adavit.graphs.builder import Builder

__all__ = ["add_batch_decisions", "class_tokens", "huge_tokens"]

LARGEST = 1e30
"""Of the logits of decisions."""
LARGEST_TOKEN = 1e17
"""Of a token's values behind the last block: of larger ones, the squares that a layer norm sums overflow float32."""


def add_batch_decisions(graph: Builder, arch: Architecture, block: int, y: str, limits: str, state: str) -> None:
    """Adds a block's decisions on y [R, D]: the outputs kept, state and sizes."""
    rows = graph.op("Slice", y, graph.ints(0), graph.ints(-1), graph.ints(0))
    logits = add_decision_logits(graph, arch, block, rows, lambda: class_tokens(graph, arch, y))
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
        state = _not_finite(graph, state, "next_decisions", LARGEST, 1)
    graph.output("next_kept", kept, ["B", sum(sizes.values())], "bool")
    graph.output("next_state", graph.op("Max", state, state) if not made else state, ["B"], "int64")
    goes_on = graph.op("Unsqueeze", graph.op("Equal", "next_state", number(graph, GOES_ON)), graph.ints(1))
    tokens = graph.op("Cast", parts[0], to=TensorProto.INT64)
    tokens = graph.op("ReduceSum", tokens, graph.ints(1), keepdims=1)
    runs = graph.op("Cast", graph.op("And", parts[2], goes_on), to=TensorProto.INT64)  # [B, 2]
    each = graph.op("Mul", runs, tokens)
    sums = graph.op("ReduceSum", each, graph.ints(0), keepdims=0)
    images = first_of(graph, graph.op("ReduceSum", runs, graph.ints(0), keepdims=0))
    attending = graph.op("Slice", each, graph.ints(0), graph.ints(1), graph.ints(1))
    longest = graph.op("Unsqueeze", graph.op("ReduceMax", attending, keepdims=0), graph.ints(0))
    mlp = graph.op("Slice", sums, graph.ints(1), graph.ints(2), graph.ints(0))
    found = graph.op("Concat", first_of(graph, sums), images, longest, mlp, axis=0)
    graph.output("next_sizes", found, [4], "int64")


def huge_tokens(graph: Builder, arch: Architecture, y: str, state: str) -> str:
    """The states [B], NOT_FINITE for images whose rows in y [R, D] are no numbers, or too large for a layer norm."""
    return _not_finite(graph, state, _by_image(graph, arch, y), LARGEST_TOKEN, 1, 2)


def _not_finite(graph: Builder, state: str, values: str, largest: float, *axes: int) -> str:
    """The states [B], NOT_FINITE for images with values [B, ...] that are no numbers, or too large."""
    # Each is compared by itself: a maximum may lose NaN.
    huge = graph.op("Not", graph.op("Less", graph.op("Abs", values), graph.scalar(largest)))
    count = graph.op("ReduceSum", graph.op("Cast", huge, to=TensorProto.FLOAT), graph.ints(*axes), keepdims=0)
    some = graph.op("Greater", count, graph.scalar(0.0))
    return graph.op("Max", state, graph.op("Where", some, number(graph, NOT_FINITE), number(graph, GOES_ON)))


def class_tokens(graph: Builder, arch: Architecture, y: str) -> str:
    """The class tokens [B, D] of rows [R, D]."""
    classes = graph.op("Gather", _by_image(graph, arch, y), graph.scalar(0, "int64"), axis=1)
    # TensorRT-RTX 1.7 does not build a product of one row that it reads from ScatterND's output: this is a copy.
    copied = graph.op("Concat", classes, first_of(graph, classes), axis=0)
    return graph.op("Slice", copied, graph.ints(0), graph.ints(-1), graph.ints(0))


def _by_image(graph: Builder, arch: Architecture, y: str) -> str:
    """The tokens of each image [B, N, D] of rows [R, D]."""
    rows = graph.op("Slice", y, graph.ints(0), graph.ints(-1), graph.ints(0))
    return graph.op("Reshape", rows, graph.ints(-1, arch.tokens, arch.width))
