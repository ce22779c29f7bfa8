"""The shapes and costs of all values of a graph, computed without a backend, so that none meets what it cannot run.

A graph whose shapes do not fit, that takes far more memory or time than its architecture says, or that reads or writes
rows by numbers which nothing bounds, is refused here, whatever a backend would do with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from adavit.bundle.known import MOST_DIMENSIONS, Known
from adavit.bundle.onnx_format import Node
from adavit.bundle.operators import RULES
from adavit.errors import shown

__all__ = ["Limits", "infer"]


class Limits(NamedTuple):
    """What a graph may take.

    Attributes:
        elements: of a value.
        cost: multiply-accumulates, and elements that are written.
    """

    elements: int
    cost: int


def infer(nodes: Iterable[Node], known: dict[str, Known], limits: Limits) -> dict[str, Known]:
    """Adds the values that nodes make to those that are known.

    Args:
        nodes: in the order they run.
        known: constants and inputs by name.
        limits: what the graph may take.

    Raises:
        ValueError: an operator takes other values than it can, or more than the limits.
    """
    cost = 0
    for node in nodes:
        try:
            given = [known[name] for name in node.inputs]
            made = RULES[node.op](given, node.attributes)
            if isinstance(made, Known):
                made = [made]
            if len(made) != len(node.outputs) or max(len(value.shape) for value in made) > MOST_DIMENSIONS:
                raise ValueError
        except (ValueError, KeyError, IndexError, TypeError):
            of = [list(known[name].shape) for name in node.inputs if name in known]
            raise ValueError(f"its operator {node.op} does not fit its inputs, {shown(of)}") from None
        sizes = [math.prod(value.shape) for value in made]
        cost += sum(sizes) + _products(node.op, given, sizes)
        if max(sizes) > limits.elements or cost > limits.cost:
            raise ValueError(f"its operator {node.op} takes more memory or time than its architecture says")
        known.update(zip(node.outputs, made, strict=True))
    return known


def _products(op: str, given: Sequence[Known], sizes: Sequence[int]) -> int:
    """Multiply-accumulates of an operator."""
    if op in ("MatMul", "Gemm"):
        return sizes[0] * given[0].shape[-1]
    return sizes[0] * math.prod(given[1].shape[1:]) if op == "Conv" else 0
