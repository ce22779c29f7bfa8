"""Where a line of offsets takes so many MACs: predicted from recorded logits, then run and put right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adavit.calibration.decisions import Decisions, shifted, units_of
from adavit.calibration.trial import Outcome, Trial
from adavit.runtime.budget import MAX_OFFSET, TRAINED, Offsets

__all__ = ["CLOSE", "Line", "Stop", "cross", "even", "meet"]

CLOSE = 0.003
"""How near to a budget the MACs of an operating point are to be, relative to it."""
FEW = 128
"""Images that tell about how far offsets move the MACs."""
MISSED = 0.03
"""How far a prediction may be off, relative to what is run, before logits are recorded anew."""
PASSES, TRIES, HALVINGS = 3, 10, 32
EXACT = 5e-4
"""How near a prediction is to come, relative to what it is to be."""

Line = Callable[[float], Offsets]
"""Offsets along a line, their MACs growing."""
Ends = tuple[float, float]


@dataclass(frozen=True)
class Stop:
    """Offsets, and what they did."""

    offsets: Offsets
    outcome: Outcome


def even(trial: Trial, offsets: Offsets) -> Line:
    """All offsets changed by as much."""
    arch = trial.runtime.architecture
    units = units_of(arch)
    return lambda by: shifted(offsets, arch.depth, dict.fromkeys(units, by))


def meet(
    trial: Trial,
    line: Line,
    level: float,
    count: int | None = None,
    ends: Ends = (-MAX_OFFSET, MAX_OFFSET),
    start: float = 0.0,
    close: float = CLOSE,
) -> Stop:
    """Where a line takes so many MACs, or what comes nearest to it of what was run.

    Args:
        trial: runs offsets.
        line: the offsets by their place on it.
        level: share of the dense MACs, on all images.
        count: images to meet it on, as the trained policy tells how they differ from all; by default all.
        ends: the least and the largest place.
        start: a place to predict from.
        close: how near is near enough, relative to the budget.
    """
    count = min(count or len(trial), len(trial))
    level *= trial.run(TRAINED, count).macs / trial.trained.macs
    part = trial.run(TRAINED, FEW).macs / trial.run(TRAINED, count).macs
    found: list[Stop] = []
    for _ in range(PASSES):
        start = _solved(trial, line, level * part, ends, start, close / 2)
        found.append(Stop(line(start), trial.run(line(start), count)))
        if abs(found[-1].outcome.macs - level) <= close * level:
            break
        part = trial.run(line(start), FEW).macs / found[-1].outcome.macs
    return min(found, key=lambda stop: abs(stop.outcome.macs - level))


def _solved(trial: Trial, line: Line, level: float, ends: Ends, start: float, close: float) -> float:
    """The place where few images take so many MACs, or the nearest that was tried."""
    (low, high), decisions, part = ends, trial.record(line(start), FEW), 1.0
    tried = {start: trial.run(line(start), FEW).macs}
    place = start
    for attempt in range(TRIES):
        if abs(tried[place] - level) <= close * level:
            break
        low, high = (place, high) if tried[place] < level else (low, place)
        if low in tried and high in tried:
            share = (level - tried[low]) / (tried[high] - tried[low])
            place = low + (0.5 if attempt % 2 else min(0.95, max(0.05, share))) * (high - low)
        else:
            place = _crossing(decisions, line, low, high, level / part)
            place = place if place not in tried else (low + high) / 2
        tried[place] = trial.run(line(place), FEW).macs
        part = tried[place] / decisions.macs(line(place))
        if abs(part - 1) > MISSED and not (low in tried and high in tried):
            decisions, part = trial.record(line(place), FEW), 1.0
    return min(tried, key=lambda place: abs(tried[place] - level))


def _crossing(decisions: Decisions, line: Line, low: float, high: float, macs: float) -> float:
    return cross(lambda place: decisions.macs(line(place)), low, high, macs)


def cross(predicted: Callable[[float], float], low: float, high: float, macs: float) -> float:
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
