"""Optimisation profiles: the shapes an engine is built for, and those it is tuned for.

Graphs for devices have these dimensions: B images; R, rows of all images and a spare one; and the room of a block: T
and U rows that run attention and the MLP, A images that run attention, K tokens of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from adavit.architecture import Architecture
from adavit.bundle.onnx_format import Value
from adavit.runtime.batch import Room

__all__ = ["Profile", "Range", "Rooms", "profiles_of"]


class Range(NamedTuple):
    """The sizes of a dimension: the least, the one to tune for, the largest."""

    least: int
    tuned: int
    most: int


Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""For each input, the least shape, the one to tune for, and the largest."""

Rooms = Callable[[int], Sequence[Room]]
"""Tells the room that each block takes for a number of images."""


def profiles_of(
    inputs: Sequence[Value], block: int | None, arch: Architecture, max_batch: int, rooms: Rooms | None = None
) -> list[Profile]:
    """The profiles of an engine: one for single images, then one for any batch, tuned for the largest.

    Args:
        inputs: of the graph.
        block: whose graph it is; None for others.
        arch: the model's shapes.
        max_batch: images of a batch at most.
        rooms: what to tune for; by default as if every image kept everything.

    Raises:
        ValueError: a dimension has another name.
    """
    return [
        {value.name: _shapes(value.shape, ranges) for value in inputs}
        for ranges in (_ranges(batch, block, arch, rooms) for batch in sorted({1, max_batch}))
    ]


def _shapes(
    shape: tuple[int | str, ...], ranges: Mapping[str, Range]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    if unknown := {size for size in shape if isinstance(size, str)} - set(ranges):
        raise ValueError(f"a graph has a dimension {min(unknown)!r}, for which there is no profile")
    found = [ranges[size] if isinstance(size, str) else Range(size, size, size) for size in shape]
    least, tuned, most = zip(*found, strict=True) if found else ((), (), ())
    return least, tuned, most


def _ranges(batch: int, block: int | None, arch: Architecture, rooms: Rooms | None) -> dict[str, Range]:
    """The sizes of every dimension, for batches up to one size."""
    rows = batch * arch.tokens
    most = Room(rows, batch, arch.tokens, rows)
    tuned = most if rooms is None or block is None else rooms(batch)[block]
    room = (Range(1, min(size, limit), limit) for size, limit in zip(tuned, most, strict=True))
    return {
        "B": Range(1, batch, batch),
        "R": Range(arch.tokens + 1, rows + 1, rows + 1),
        **dict(zip(("T", "A", "K", "U"), room, strict=True)),
    }
