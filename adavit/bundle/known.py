"""What is known of a value in a graph, before it runs: its type, its shape, and between what its whole numbers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "FAR",
    "FLOATS",
    "MOST_DIMENSIONS",
    "WHOLE",
    "Attributes",
    "Known",
    "Rule",
    "axis_of",
    "bounds_of",
    "broadcast",
    "floats",
    "need",
    "numbers_of",
    "same_type",
    "whole",
    "whole_vector",
]

Shape = tuple[int, ...]
Bounds = tuple[int, int]
FLOATS = ("float32", "float16")
WHOLE = ("int64", "bool")
FEW = 64
"""Whole numbers of a value at most that are followed one by one."""
FAR = 1 << 40
"""Beyond all whole numbers of a graph."""
MOST_DIMENSIONS = 8


class Known(NamedTuple):
    """What is known of a value.

    Attributes:
        dtype: numpy's name of its type.
        shape: its dimensions.
        values: its numbers, where they are whole, few, and the same for every image.
        bounds: the least and the largest that its whole numbers can be.
    """

    dtype: str
    shape: Shape
    values: tuple[int, ...] | None = None
    bounds: Bounds | None = None


Attributes = Mapping[str, Any]
Rule = Callable[[list[Known], Attributes], Known | list[Known]]
"""What an operator makes of its inputs; it raises ValueError where it cannot."""


def need(*facts: bool) -> None:
    """Raises ValueError where a fact does not hold."""
    if not all(facts):
        raise ValueError


def floats(given: Sequence[Known]) -> str:
    """The one type of float that values have."""
    dtype = given[0].dtype
    need(dtype in FLOATS, all(value.dtype == dtype for value in given))
    return dtype


def axis_of(attributes: Attributes, rank: int, default: int = 0) -> int:
    """The axis that an operator works along, from 0 on."""
    axis = attributes.get("axis", default)
    need(-rank <= axis < rank)
    return int(axis) % rank


def whole_vector(value: Known) -> tuple[int, ...]:
    """The numbers of a vector of whole numbers."""
    need(value.dtype == "int64", len(value.shape) == 1, value.values is not None)
    return value.values or ()


def broadcast(*shapes: Shape) -> Shape:
    """The shape of what is made of values of these shapes, number by number."""
    rank, found = max(map(len, shapes)), []
    for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        size = max(sizes)
        need(all(other in (1, size) for other in sizes))
        found.append(size)
    return tuple(found)


def whole(shape: Shape, bounds: Bounds | None, values: Any = None, dtype: str = "int64") -> Known:
    """What is known of whole numbers; of too many, their bounds alone."""
    if values is None or np.size(values) > FEW:
        return Known(dtype, shape, None, bounds)
    numbers = tuple(int(number) for number in np.ravel(values))
    found = (min(numbers), max(numbers)) if numbers else None
    need(found is None or -FAR <= found[0] <= found[1] <= FAR)
    return Known(dtype, shape, numbers, found)


def numbers_of(value: Known) -> npt.NDArray[Any] | None:
    """All whole numbers of a value, where they are known."""
    return None if value.values is None else np.array(value.values, object).reshape(value.shape)


def bounds_of(*given: Known) -> Sequence[Bounds]:
    """Of whole numbers; a value that nothing bounds does not fit."""
    need(all(value.bounds is not None for value in given))
    found = [value.bounds or (0, 0) for value in given]
    need(all(-FAR <= low <= high <= FAR for low, high in found))
    return found


def same_type(given: Sequence[Known]) -> str:
    """The one type that values have."""
    dtype = given[0].dtype
    need(dtype in (*FLOATS, *WHOLE), all(value.dtype == dtype for value in given))
    return dtype
