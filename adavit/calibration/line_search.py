"""Where a line of offsets takes so many MACs: predicted from recorded logits, then run and put right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from adavit.bundle.operating_points import MAX_OFFSET, TRAINED, Offsets
from adavit.calibration.decisions import shifted, units_of
from adavit.calibration.offset_evaluator import OffsetEvaluator, Outcome

__all__ = ["CLOSE", "FoundPoint", "Line", "crossing", "even_line", "point_at_macs"]

CLOSE = 0.003
"""How near to a budget the MACs of an operating point are to be, relative to it."""
FEW = 64
"""Images that tell about how far offsets move the MACs."""
PASSES, TRIES, HALVINGS = 3, 10, 32
EXACT = 5e-4
"""How near a prediction is to come, relative to what it is to be."""


@dataclass(frozen=True)
class FoundPoint:
    """Offsets, and what they did."""

    offsets: Offsets
    outcome: Outcome


@dataclass(frozen=True)
class Line:
    """Offsets along a line, their MACs growing.

    Attributes:
        offsets: by the place on it.
        ends: the least and the largest place.
        start: a place between them.
        tried: the MACs of few images at the places that ran, which later budgets begin with.
    """

    offsets: Callable[[float], Offsets]
    ends: tuple[float, float] = (-MAX_OFFSET, MAX_OFFSET)
    start: float = 0.0
    tried: dict[float, float] = field(default_factory=dict)


def even_line(evaluator: OffsetEvaluator, offsets: Offsets) -> Line:
    """All offsets changed by as much."""
    arch = evaluator.runtime.architecture
    units = units_of(arch)
    return Line(lambda by: shifted(offsets, arch.depth, dict.fromkeys(units, by)))


def point_at_macs(
    evaluator: OffsetEvaluator, line: Line, level: float, count: int | None = None, close: float = CLOSE
) -> FoundPoint:
    """Where a line takes so many MACs, or what comes nearest to it of what was run.

    Args:
        evaluator: runs offsets.
        line: where to look.
        level: share of the dense MACs, on all images.
        count: images to meet it on, as the trained policy tells how they differ from all; by default all.
        close: how near is near enough, relative to the budget.
    """
    count = min(count or len(evaluator), len(evaluator))
    level *= evaluator.run(TRAINED, count).macs / evaluator.trained.macs
    part = evaluator.run(TRAINED, FEW).macs / evaluator.run(TRAINED, count).macs
    found: list[FoundPoint] = []
    for _ in range(PASSES):
        offsets = line.offsets(_solved(evaluator, line, level * part, close / 2))
        found.append(FoundPoint(offsets, evaluator.run(offsets, count)))
        if abs(found[-1].outcome.macs - level) <= close * level:
            break
        part = evaluator.run(offsets, FEW).macs / found[-1].outcome.macs
    return min(found, key=lambda point: abs(point.outcome.macs - level))


def _solved(evaluator: OffsetEvaluator, line: Line, level: float, close: float) -> float:
    """The place where few images take so many MACs, or the nearest that was tried."""
    tried, place = line.tried, line.start
    for attempt in range(TRIES):
        if place not in tried:
            tried[place] = evaluator.run(line.offsets(place), FEW).macs
        best = min(tried, key=lambda place: abs(tried[place] - level))
        if abs(tried[best] - level) <= close * level:
            break
        places = sorted(tried)
        if around := next(((a, b) for a, b in pairwise(places) if tried[a] < level <= tried[b]), None):
            low, high = around
            share = (level - tried[low]) / (tried[high] - tried[low])
            place = low + (0.5 if attempt % 2 else min(0.95, max(0.05, share))) * (high - low)
        else:
            low, high = (places[-1], line.ends[1]) if tried[places[-1]] < level else (line.ends[0], places[0])
            place = _predicted(evaluator, line, low, high, level)
            place = (low + high) / 2 if place in tried else place
    return best


def _predicted(evaluator: OffsetEvaluator, line: Line, low: float, high: float, level: float) -> float:
    """Where so many MACs are predicted, from the end of a stretch that was tried."""
    decisions = evaluator.record(line.offsets(low if low in line.tried else high), FEW)
    return crossing(lambda place: decisions.macs(line.offsets(place)), low, high, level)


def crossing(predicted: Callable[[float], float], low: float, high: float, macs: float) -> float:
    """Where what is predicted passes so many MACs; where it never does, where it last changes towards them."""
    least, most = predicted(low), predicted(high)
    macs = min(most, max(macs, least * (1 + EXACT / 2)))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = predicted(middle)
        if least < found < most and abs(found - macs) <= EXACT * macs:
            return middle
        low, high = (middle, high) if found < macs else (low, middle)
    return high
