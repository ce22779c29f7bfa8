"""Which images a report shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["spread_over_classes"]


def spread_over_classes(labels: Sequence[int | None], most: int) -> list[int]:
    """Positions of images to show, in order: evenly of all classes, and the first of each.

    Args:
        labels: the images' classes; None is one more.
        most: how many. Of more classes than that, evenly spaced ones have one image each.
    """
    seen: Counter[int | None] = Counter()
    turns: list[tuple[int, int]] = []
    for position, label in enumerate(labels):
        turns.append((seen[label], position))
        seen[label] += 1
    if len(seen) > most:
        firsts = [position for turn, position in turns if turn == 0]
        return [firsts[index] for index in np.linspace(0, len(firsts) - 1, most).round().astype(int)]
    return sorted(position for _, position in sorted(turns)[:most])
