"""Moving rows of tokens, as graphs: for backends whose buffers the host cannot reach.

The dispatcher moves rows between engines. In host memory that is a copy; on a device these engines do it.
"""

from __future__ import annotations

from collections.abc import Iterator

from adavit.architecture import Architecture
from adavit.export.graph import Graph

__all__ = ["row_graphs"]


def row_graphs(arch: Architecture, opset: int) -> Iterator[Graph]:
    """rows.gather, rows.scatter and, where there are vectors to add, rows.add."""
    yield _gather_graph(arch, opset)
    yield _scatter_graph(arch, opset)
    if arch.head_policy:
        yield _add_graph(arch, opset)


def _gather_graph(arch: Architecture, opset: int) -> Graph:
    """x [N, D] and the kept tokens [K] -> their rows [K, D]."""
    graph = Graph("rows.gather", opset)
    x, kept = graph.input("x", [arch.tokens, arch.width]), graph.input("kept", ["K"], "int64")
    graph.output("y", graph.op("Gather", x, kept, axis=0), ["K", arch.width])
    return graph


def _scatter_graph(arch: Architecture, opset: int) -> Graph:
    """x [N, D], rows [K, D] and the kept tokens [K] -> x with these rows in their places."""
    graph = Graph("rows.scatter", opset)
    x, rows = graph.input("x", [arch.tokens, arch.width]), graph.input("rows", ["K", arch.width])
    kept = graph.op("Unsqueeze", graph.input("kept", ["K"], "int64"), graph.ints(1))
    graph.output("y", graph.op("ScatterND", x, kept, rows), [arch.tokens, arch.width])
    return graph


def _add_graph(arch: Architecture, opset: int) -> Graph:
    """x [K, D], vectors [L, D] and the index [1] of one -> x with it added to every row."""
    graph = Graph("rows.add", opset)
    x, vectors = graph.input("x", ["K", arch.width]), graph.input("vectors", [arch.depth, arch.width])
    vector = graph.op("Gather", vectors, graph.input("index", [1], "int64"), axis=0)
    graph.output("y", graph.op("Add", x, vector), ["K", arch.width])
    return graph
