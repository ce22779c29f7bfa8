"""A block in one engine, for a set of heads: from the tokens to those behind it, and the next block's decisions.

The weights are inputs that a runtime makes constants, which it can do for as many sets of heads as it has memory for.
They are right factors, which backends arrange once where they are constants. Attention is ONNX Runtime's own operator,
since no other backend takes these engines: the one node of many that ONNX's operators need, it saves what each of them
costs. It lacks its number of heads, which the runtime adds with the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from adavit.architecture import Architecture
from adavit.export.blocks import (
    add_bias,
    add_choice_logits,
    add_head,
    add_norm,
    add_token_logits,
)
from adavit.export.graph import CONTRIB, Graph
from adavit.export.stem import add_stem
from adavit.export.weights import Weights
from adavit.runtime.plan import set_kinds

__all__ = ["set_graphs", "stem_graph"]

ATTENTION = "attention"
"""The name of the node that lacks its number of heads."""


def stem_graph(arch: Architecture, weights: Weights, opset: int) -> Graph:
    """The stem with the first block's decisions: images [1, 3, S, S] -> x [1, N, D], and next_* as of `set_graphs`."""
    graph = Graph("stem_set", opset)
    images = graph.input("images", [1, 3, arch.image_size, arch.image_size])
    graph.output("x", add_stem(graph, arch, weights, images), [1, arch.tokens, arch.width])
    _add_decisions(graph, arch, weights.under("blocks.0"), 0, graph.op("Squeeze", "x", graph.ints(0)))
    return graph


def set_graphs(arch: Architecture, weights: Weights, block: int, opset: int) -> Iterator[Graph]:
    """What a block may be run by in one engine: for each of `set_kinds`, and `decide` for its decisions alone.

    The first block's are the stem's.

    For each kind: x, norm1(x) [N, D] and the kept tokens [N] -> the tokens y [N, D] behind the block.

    The weights of h heads with c = h * d channels are qkv [D, 3c] and qkv_bias [3c], queries before keys before values;
    proj [c, D] and proj_bias [D]; the numbers of the heads [h], fc1 [c, hidden] and fc2 [hidden, D].

    But for the last block, next_normed is the next block's norm1(y); next_kept [1, N] and next_choices [1, H + 2] are
    its decisions: what exceeds token_thresholds [N] and choice_thresholds [H + 2]. y may be where x is, and
    next_normed where normed is. `decide` has x as its input, and as next_* what belongs to this block. Behind the last
    block there are the head's logits [1, C] instead.
    """
    if block:
        deciding = Graph(f"blocks.{block}.decide_set", opset)
        x = deciding.input("x", [arch.tokens, arch.width])
        _add_decisions(deciding, arch, weights.under(f"blocks.{block}"), block, x)
        yield deciding
    for kind in set_kinds(arch, block):
        graph = Graph(f"blocks.{block}.{kind}_set", opset)
        _add_sublayers(graph, arch, weights.under(f"blocks.{block}"), arch.adapts_heads(block), kind)
        if block + 1 < arch.depth:
            _add_decisions(graph, arch, weights.under(f"blocks.{block + 1}"), block + 1, "y")
        else:
            first = graph.op("Slice", "y", graph.ints(0), graph.ints(1), graph.ints(0))
            add_head(graph, arch, weights, first)
        yield graph


def _add_sublayers(graph: Graph, arch: Architecture, part: Weights, chosen: bool, kind: str) -> None:
    """Adds the kept sub-layers on the kept tokens, as [1, K, D]: the output y. Heads may be `chosen`, or are all."""
    size: list[int | str] = [arch.tokens, arch.width]
    x = graph.input("x", size)
    kept = graph.op("NonZero", graph.input("kept", [arch.tokens], "bool")) if arch.token_policy else ""

    def taken(tokens: str) -> str:
        return graph.op("Gather", tokens, kept, axis=0) if kept else graph.op("Unsqueeze", tokens, graph.ints(0))

    rows = taken(x)
    if kind != "mlp":
        rows = _add_attention(graph, arch, rows, taken(graph.input("normed", size)))
    if kind != "attention":
        rows = _add_mlp(graph, arch, part, rows, chosen)
    if kept:
        y = graph.op("ScatterND", x, graph.op("Unsqueeze", kept, graph.ints(2)), rows)
    else:
        y = graph.op("Squeeze", rows, graph.ints(0))
    graph.output("y", y, size)


def _add_attention(graph: Graph, arch: Architecture, x: str, normed: str) -> str:
    """Adds the attention sub-layer: [1, K, D] -> [1, K, D]."""
    qkv, bias = graph.input("qkv", [arch.width, "3c"]), graph.input("qkv_bias", ["3c"])
    mixed = graph.op("Attention", normed, qkv, bias, name=ATTENTION, domain=CONTRIB, scale=1.0)
    update = graph.op("MatMul", mixed, graph.input("proj", ["c", arch.width]))
    return graph.op("Add", graph.op("Add", update, graph.input("proj_bias", [arch.width])), x)


def _add_mlp(graph: Graph, arch: Architecture, part: Weights, x: str, chosen: bool) -> str:
    """Adds the MLP sub-layer: [1, K, D] -> [1, K, D]."""
    normed = add_norm(graph, arch, part, "norm2", x)
    if chosen:
        by_head = graph.op("Reshape", normed, graph.ints(0, 0, arch.heads, arch.head_width))
        kept = graph.op("Gather", by_head, graph.input("heads", ["h"], "int64"), axis=2)
        normed = graph.op("Reshape", kept, graph.ints(0, 0, -1))
    hidden = graph.op("MatMul", normed, graph.input("fc1", ["c", arch.hidden]))
    hidden = graph.gelu(add_bias(graph, part, "mlp.fc1", hidden))
    update = graph.op("MatMul", hidden, graph.input("fc2", [arch.hidden, arch.width]))
    return graph.op("Add", add_bias(graph, part, "mlp.fc2", update), x)


def _add_decisions(graph: Graph, arch: Architecture, part: Weights, block: int, x: str) -> None:
    """Adds norm1 of x and the decisions of the block that takes it."""
    graph.output("next_normed", add_norm(graph, arch, part, "norm1", x), [arch.tokens, arch.width])
    if arch.token_policy:
        logits = add_token_logits(graph, part, "next_normed")
        thresholds = graph.input("token_thresholds", [arch.tokens])
        graph.output("next_kept", graph.op("Greater", logits, thresholds), [1, arch.tokens], "bool")
    if count := arch.choices(block):
        logits = add_choice_logits(graph, arch, part, block, x)
        thresholds = graph.input("choice_thresholds", [count])
        graph.output("next_choices", graph.op("Greater", logits, thresholds), [1, count], "bool")
