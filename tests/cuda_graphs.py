"""CUDA graphs of a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Work = Callable[[], None]


class Node:
    """Of a graph: work, or a body that runs where a condition holds."""

    def __init__(self, after: Iterable[Node], work: Work | None = None, body: Graph | None = None, handle: int = 0):
        self.after, self.work, self.body, self.handle = tuple(after), work, body, handle


class Graph:
    """What was recorded; the body of a node has its graph as `parent`."""

    def __init__(self, parent: Graph | None = None) -> None:
        self.nodes: list[Node] = []
        self.handles: list[int] = []
        self.parent, self.alive = parent, True

    def root(self) -> Graph:
        return self if self.parent is None else self.parent.root()


class Condition:
    def __init__(self, graph: Graph, default: int) -> None:
        self.graph, self.default, self.value = graph, default, default
        self.used = False


class Executable:
    """A graph's nodes in the order in which they run; a body's are within."""

    def __init__(self, graph: Graph) -> None:
        self.handles = [handle for every in _graphs(graph) for handle in every.handles]
        self.nodes = _order(graph)
        self.running = 0


def _graphs(graph: Graph) -> list[Graph]:
    """A graph and all its bodies."""
    bodies = [node.body for node in graph.nodes if node.body is not None]
    return [graph, *(found for body in bodies for found in _graphs(body))]


def _order(graph: Graph) -> list[tuple[Node, list[Any]]]:
    """Nodes as their dependencies allow, the last recorded first; with each what its body has."""
    waiting, done, found = list(graph.nodes), set(), []
    while waiting:
        node = next(node for node in reversed(waiting) if done.issuperset(node.after))
        waiting.remove(node)
        done.add(node)
        found.append((node, [] if node.body is None else _order(node.body)))
    return found


def with_ancestors(nodes: list[Node]) -> set[Node]:
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.after
    return found
