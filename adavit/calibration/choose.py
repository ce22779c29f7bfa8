"""For each of some budgets, the offsets that score best among those that a walk suggests.

The walk takes one step at a time, so it can spend early what it misses later, and it never takes back what was given up
for little. So at each budget, from several places on the way down, what is left of the budget is spent in two ways:
on all decisions alike, and as the way up spends it. What loses nothing is given up at larger budgets too, then, and
what it saves is spent where it gains. All of these are tried on all images, and the best is taken; the trained policy
moved evenly, where none is surely better. In the end, what is good at one budget is tried at its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from adavit.calibration.trial import Trial
from adavit.calibration.walk import EVEN_STEP, FIRST, Stop, Way, moves_of, shifted, walk
from adavit.runtime.budget import MAX_OFFSET, TRAINED, Offsets

__all__ = ["CLOSE", "Line", "best_stops", "meet"]

PARTS = 3
"""Of the way down; budgets are spent from where each begins, the trained policy the first, and where the last ends."""
CLOSE = 0.003
"""How near to a budget the MACs on all images are to be, relative to it."""
MISSED = 0.02
"""How far they may be at most, for offsets to be one of those that are tried."""
TRIES = 16
PASSES = 3

Line = Callable[[float], Offsets]
"""Offsets along a line, their MACs growing."""


def best_stops(trial: Trial, budgets: Sequence[float]) -> dict[float, Stop]:
    """By ascending MACs, from the least of the budgets to the largest, the offsets that score best there.

    At the budgets, and between them where they are more than a step of all decisions apart.
    """
    asked = sorted(budgets)
    path = walk(trial, asked[0], asked[-1])
    return spread(trial, {level: _best(_candidates(trial, path, level)) for level in _levels(asked)})


def spread(trial: Trial, found: dict[float, Stop]) -> dict[float, Stop]:
    """Takes what is good at a level to the levels next to it, moved evenly to their MACs: upwards, then downwards.

    Levels are searched one by one, so that a larger one may miss what a smaller one has found.
    """
    found, levels = dict(found), list(found)
    for order in (levels, levels[::-1]):
        for source, level in pairwise(order):
            moved = _moved(trial, found[source].offsets, level)
            if moved is not None and _is_close(moved, level):
                found[level] = _best([found[level], moved])
    return found


def _best(stops: list[Stop]) -> Stop:
    """The stop that surely scores best: the first, unless another's lead is more than one standard error of it."""
    first = stops[0].outcome
    return max(stops, key=lambda stop: stop.outcome.score - stop.outcome.doubt(first))


def _levels(marks: list[float]) -> list[float]:
    """The marks, with others between them so that they are about a step of all decisions apart."""
    parts = [max(1, round((high - low) / EVEN_STEP)) for low, high in pairwise(marks)]
    between = [
        low + (high - low) * part / count
        for (low, high), count in zip(pairwise(marks), parts, strict=True)
        for part in range(count)
    ]
    return [*between, marks[-1]]


def _candidates(trial: Trial, path: Way, level: float) -> list[Stop]:
    """Stops of about so many MACs, on all images: the trained policy moved evenly, and what the walk suggests."""
    arch, last = trial.runtime.architecture, float(len(path.stops) - 1)
    middle = next(position for position, stop in enumerate(path.stops) if stop.offsets == TRAINED)
    found: list[Stop | None] = []
    for place in dict.fromkeys(round(middle * (1 - part / PARTS)) for part in range(PARTS + 1)):
        base = path.stops[place].offsets
        found.append(_moved(trial, base, level))
        if place < middle:
            found.append(meet(trial, partial(_spent, base, path, arch.depth), float(middle), last, level))
    found.append(meet(trial, path.offsets, 0.0, last, level))
    stops = [stop for stop in found if stop is not None]
    close = [stop for stop in stops if _is_close(stop, level)]
    return close or stops or [_nearest(path, level)]  # more MACs would be an unfair advantage


def _moved(trial: Trial, base: Offsets, level: float) -> Stop | None:
    """Offsets moved evenly to so many MACs, on all images; None where they come nowhere near."""
    arch = trial.runtime.architecture
    even = partial(shifted, base, arch.depth, moves_of(arch)[-1])
    return meet(trial, even, *_reach(trial, even, level * _part(trial)), level)


def _is_close(stop: Stop, level: float) -> bool:
    return abs(stop.outcome.macs - level) <= CLOSE * level


def _spent(base: Offsets, path: Way, depth: int, position: float) -> Offsets:
    """The offsets of a place on the way down and of a position on the way up, both."""
    return base.plus(path.offsets(position), depth)


def _nearest(path: Way, level: float) -> Stop:
    """The stop of a way that is nearest to so many MACs."""
    return min(path.stops, key=lambda stop: abs(stop.outcome.macs - level))


def _part(trial: Trial) -> float:
    """The MACs of the images that tell them about, relative to those of all, as the trained policy has them."""
    return trial.size(TRAINED).macs / trial.trained.macs


def _reach(trial: Trial, even: Line, macs: float) -> tuple[float, float]:
    """Between which changes of all offsets few images pass so many MACs, and what all may take; from 0 outwards."""
    sign = 1 if trial.size(even(0.0)).macs < macs else -1
    near, far = 0.0, FIRST / 4
    while far < MAX_OFFSET and (left := sign * (macs - trial.size(even(sign * far)).macs)) > -MISSED * macs:
        near, far = far if left > MISSED * macs else near, 2 * far
    return (near, far) if sign > 0 else (-far, -near)


def meet(trial: Trial, line: Line, low: float, high: float, level: float) -> Stop | None:
    """Where a line takes so many MACs on all images, between two places on it; None where it comes nowhere near."""
    part = _part(trial)
    best: Stop | None = None
    for _ in range(PASSES):
        offsets = _cross(trial, line, low, high, level * part)
        stop = Stop(offsets, trial.run(offsets))
        if best is None or abs(stop.outcome.macs - level) < abs(best.outcome.macs - level):
            best = stop
        if abs(best.outcome.macs - level) <= CLOSE * level:
            return best
        part = trial.size(offsets).macs / stop.outcome.macs
    return best if best and abs(best.outcome.macs - level) <= MISSED * level else None


def _cross(trial: Trial, line: Line, low: float, high: float, macs: float) -> Offsets:
    """Where a line takes so many MACs on few images, or the end that is nearest to it."""
    below, above = (trial.size(line(end)).macs for end in (low, high))
    if macs <= below or macs >= above:
        return line(low if macs <= below else high)
    for attempt in range(TRIES):
        share = 0.5 if attempt % 2 else min(0.95, max(0.05, (macs - below) / (above - below)))
        middle = low + share * (high - low)
        taken = trial.size(line(middle)).macs
        if abs(taken - macs) <= CLOSE / 4 * macs:
            break
        if taken < macs:
            low, below = middle, taken
        else:
            high, above = middle, taken
    return line(middle)
