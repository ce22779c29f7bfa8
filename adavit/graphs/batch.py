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

from onnx import TensorProto

from adavit.architecture import Architecture
from adavit.bundle.keys import BETWEEN, GOES_ON, NOT_FINITE, OVERFLOWED, STATE_BEHIND, STATE_BETWEEN
from adavit.graphs.batch_decisions import add_batch_decisions, class_tokens, huge_tokens
from adavit.graphs.batch_rows import Grid, Heads, Policies, Rows, number, overflowed
from adavit.graphs.block import add_head, add_norm, add_update
from adavit.graphs.builder import Builder
from adavit.graphs.precision import Precision
from adavit.graphs.stem import add_stem

__all__ = ["GOES_ON", "NOT_FINITE", "OVERFLOWED", "add_batch_block", "add_batch_stem"]


def add_batch_stem(graph: Builder, arch: Architecture) -> None:
    """Makes a graph the stem's, for a batch."""
    images = graph.input("images", ["B", 3, arch.image_size, arch.image_size])
    limits = graph.input("limits", ["B", 3])
    rows = graph.op("Reshape", add_stem(graph, arch, images), graph.ints(-1, arch.width))
    spare = graph.op("Expand", graph.scalar(0.0), graph.ints(1, arch.width))
    graph.output("y", graph.op("Concat", rows, spare, axis=0), ["R", arch.width])
    batch = graph.op("Shape", images, start=0, end=1)
    add_batch_decisions(graph, arch, 0, "y", limits, graph.op("Expand", number(graph, GOES_ON), batch))


def add_batch_block(graph: Builder, arch: Architecture, block: int, precisions: Mapping[str, Precision]) -> None:
    """Makes a graph a block's, for a batch; `precisions` are of its sub-layers, "attention" and "mlp"."""
    last = block + 1 == arch.depth
    x = graph.input("x", ["R", arch.width])
    policy = Policies(graph, arch)
    limits = "" if last else graph.input("limits", ["B", 3])
    numbers = graph.input("numbers", ["R"], "int64")
    heads = Heads(graph, policy)
    state = heads.missing("attention", policy.state)
    runs, room = policy.runs("attention", state), graph.input("attention_rows", ["T"], "int64")
    rows = Rows(graph, arch, policy.tokens, runs, numbers, room)
    state, x = _attention(graph, arch, block, x, rows, heads, state, precisions["attention"])
    state = heads.missing("mlp", state)
    runs, room = policy.runs("mlp", state), graph.input("mlp_rows", ["U"], "int64")
    rows = Rows(graph, arch, policy.tokens, runs, numbers, room)
    state, y = _mlp(graph, arch, block, x, rows, heads, state, precisions["mlp"])
    graph.output("y", y, ["R", arch.width])
    if last:
        add_head(graph, arch, class_tokens(graph, arch, "y"), "B")
        graph.output("next_state", huge_tokens(graph, arch, "y", state), ["B"], "int64")
    else:
        add_batch_decisions(graph, arch, block + 1, "y", limits, state)


def _attention(
    graph: Builder,
    arch: Architecture,
    block: int,
    x: str,
    rows: Rows,
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
    images = graph.input("attention_images", ["A"], "int64")
    tokens = graph.input("attention_tokens", ["K"], "int64")

    before = rows.of(x)
    normed = add_norm(graph, arch, before, "norm1", f"{site}.norm1", "qkv.input")
    qkv = graph.op("Gemm", precision.enter(graph, normed, f"{site}.qkv"), weights["qkv"], transB=1)
    if "bias" in weights:
        qkv = graph.op("Add", qkv, weights["bias"])
    parts = graph.op("Reshape", qkv, graph.ints(0, 3, -1, d))  # [T, 3, h, d]

    grid = Grid(graph, rows, images, tokens)
    by_image = graph.op("Gather", parts, grid.places, axis=0)  # [A, K, 3, h, d]
    kinds = graph.op("Transpose", by_image, perm=[2, 0, 3, 1, 4])
    query, key, value = (graph.op("Gather", kinds, graph.scalar(i, "int64"), axis=0) for i in range(3))  # [A, h, K, d]
    key = graph.op("Transpose", key, perm=[0, 1, 3, 2])
    scores = precision.leave(graph, graph.op("MatMul", query, key))
    shares = precision.enter(graph, graph.op("Softmax", graph.op("Add", scores, grid.padding), axis=-1))
    mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])  # [A, K, h, d]
    mixed = graph.op("Reshape", mixed, graph.op("Concat", graph.ints(-1), graph.op("Shape", mixed, start=2), axis=0))
    dtype = TensorProto.FLOAT16 if precision.name == "fp16" else TensorProto.FLOAT
    mixed = graph.op("Reshape", heads.masked(grid.back(mixed), rows.images, dtype), graph.ints(0, -1), name="mixed")
    after = add_update(graph, block, "attn", "proj", mixed, weights["proj"], before, precision, "")

    return overflowed(graph, state, grid.beyond(), STATE_BETWEEN), rows.back(x, after, BETWEEN)


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
    return overflowed(graph, state, rows.beyond(), STATE_BEHIND), rows.back(x, after)
