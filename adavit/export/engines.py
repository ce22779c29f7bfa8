"""All engines of a bundle, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from adavit.architecture import Architecture
from adavit.export import blocks, gather, sets
from adavit.export.graph import Graph
from adavit.export.rows import row_graphs
from adavit.export.stem import add_stem
from adavit.export.weights import Weights
from adavit.runtime.plan import set_kinds

__all__ = ["engine_count", "make_engines"]


def make_engines(
    arch: Architecture, weights: Weights, opset: int, with_dense: bool
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yields (name, model) of every engine that the model's policies can need.

    A model without policies needs its dense graph alone.
    """
    for graph in _graphs(arch, weights, opset, with_dense):
        yield graph.name, graph.build()


def engine_count(arch: Architecture, with_dense: bool) -> int:
    """How many engines `make_engines` yields."""
    if not arch.adapts:
        return 1
    by_block = sum(4 + 4 * arch.adapts_heads(block) + len(set_kinds(arch, block)) for block in range(arch.depth))
    return 4 + by_block + 2 * arch.head_policy + with_dense


def _graphs(arch: Architecture, weights: Weights, opset: int, with_dense: bool) -> Iterator[Graph]:
    if arch.adapts:
        yield from _adaptive(arch, weights, opset)
    if with_dense or not arch.adapts:
        yield _dense(arch, weights, opset)


def _adaptive(arch: Architecture, weights: Weights, opset: int) -> Iterator[Graph]:
    yield _stem(arch, weights, opset)
    yield sets.stem_graph(arch, weights, opset)
    for block in range(arch.depth):
        yield blocks.decide_graph(arch, weights, block, opset)
        yield blocks.attention_graph(arch, weights, block, opset)
        yield blocks.mlp_graph(arch, weights, block, opset)
        if arch.adapts_heads(block):
            yield gather.attention_weights_graph(arch, weights, block, opset)
            yield gather.attention_gather_graph(arch, weights, block, opset)
            yield gather.mlp_weights_graph(arch, weights, block, opset)
            yield gather.mlp_gather_graph(arch, weights, block, opset)
        yield from sets.set_graphs(arch, weights, block, opset)
    if arch.head_policy:
        yield blocks.empty_graph(arch, weights, opset)
    yield _head(arch, weights, opset)
    yield from row_graphs(arch, opset)


def _images(graph: Graph, arch: Architecture) -> str:
    return graph.input("images", ["B", 3, arch.image_size, arch.image_size])


def _stem(arch: Architecture, weights: Weights, opset: int) -> Graph:
    graph = Graph("stem", opset)
    graph.output("x", add_stem(graph, arch, weights, _images(graph, arch)), ["B", arch.tokens, arch.width])
    return graph


def _head(arch: Architecture, weights: Weights, opset: int) -> Graph:
    graph = Graph("head", opset)
    blocks.add_head(graph, arch, weights, graph.input("x", ["B", arch.width]))
    return graph


def _dense(arch: Architecture, weights: Weights, opset: int) -> Graph:
    """The dense model: images [B, 3, S, S] -> logits [B, C], every policy on, in one graph."""
    graph = Graph("dense", opset)
    x = add_stem(graph, arch, weights, _images(graph, arch))
    for block in range(arch.depth):
        part = weights.under(f"blocks.{block}")
        normed = blocks.add_norm(graph, arch, part, "norm1", x)
        x = blocks.add_attention(graph, arch, part, x, normed, batched=True)
        x = blocks.add_mlp(graph, arch, part, x)
    blocks.add_head(graph, arch, weights, graph.op("Gather", x, graph.weight("first", np.int64(0)), axis=1))
    return graph
