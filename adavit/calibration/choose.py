"""For each of some budgets, the offsets that score best of a few that two walks suggest.

One walk goes down from the trained policy, kind by kind and block by block. The other goes up from where the first
scores best: what loses nothing is given up for what gains. There is little to win above the trained policy, so steps up
change a kind in all blocks. A walk takes one step at a time, so it can spend early what it misses later. So at each
budget its place is compared with the trained policy and with the best stop of the first walk, both moved evenly to as
many MACs, and then with what was found for the neighbouring budgets. In the end all images run: the trained policy
moved evenly is taken where the other is not surely better.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.calibration.decisions import units_of
from adavit.calibration.meet import Line, Stop, even, meet
from adavit.calibration.trial import Trial
from adavit.calibration.walk import COMPARED, Walk, moves_by_kind, moves_by_unit
from adavit.calibration.work import Work

__all__ = ["best_stops", "expected"]

STEP = 0.015
"""Least share of the dense MACs that a step down takes; one up takes twice as much, since there is less to win."""
STEPS = 8
"""About how many steps go down to the least budget; half as many go up."""
SOME, ROUGHLY = 256, 0.01
"""Images that settings and steps up are compared on, and how near to a budget their MACs are to be, relative to it."""
TOO_FAR = 0.02
"""How far a stop may be from a budget, relative to it, to be compared with others."""


def expected(trial: Trial, budgets: int) -> list[float]:
    """About how many images the parts of a search run: two walks, each budget, all of them, and between them."""
    every, some = len(trial), min(SOME, len(trial))
    compared, units = min(COMPARED, every), len(units_of(trial.runtime.architecture))
    walks = [compared * (0.45 * units + 2.5 * STEPS), some * (2.0 + 1.5 * STEPS)]
    return [*walks, *[6.0 * some] * budgets, budgets * (2.0 * some + 2 * every), budgets * (2.0 * compared + every)]


def best_stops(trial: Trial, budgets: Sequence[float], work: Work) -> dict[float, Stop]:
    """By ascending budget, the offsets that score best there, and what they do on all images."""
    budgets = sorted(budgets)
    work.begin()
    down = _down(trial, budgets[0])
    base = _best_stop(down).offsets
    work.begin()
    up = _up(trial, base, budgets[-1])
    part = _part(trial, SOME)
    lines = {offsets: even(trial, offsets) for offsets in (TRAINED, base)}
    evens: dict[float, list[Stop]] = {}
    found: dict[float, Stop] = {}
    for level in budgets:
        work.begin()
        evens[level] = [_roughly(trial, line, level) for line in lines.values()]
        place = _place(trial, down if level < trial.trained.macs else up, level)
        found[level] = _better([*evens[level], place], level * part)
    work.begin()
    for order in (budgets, budgets[::-1]):
        for source, level in pairwise(order):
            if found[source] in evens[source]:
                continue  # the same, moved evenly, was compared
            moved = _roughly(trial, even(trial, found[source].offsets), level)
            found[level] = _better([found[level], moved], level * part)
    return {level: _on_all(trial, [evens[level][0], found[level]], level) for level in budgets}


def _on_all(trial: Trial, stops: Sequence[Stop], level: float) -> Stop:
    """The best of some stops as all images tell, moved evenly to the budget."""
    best = _better([Stop(stop.offsets, trial.run(stop.offsets)) for stop in stops], level)
    return meet(trial, even(trial, best.offsets), level)


def _down(trial: Trial, least: float) -> Walk:
    """From the trained policy to the least budget, and in any case until a step loses some score."""
    least *= _part(trial, COMPARED)
    step = max(STEP, (trial.run(TRAINED, COMPARED).macs - least) / STEPS)
    walk = Walk(trial, TRAINED, -1, step, moves_by_unit(trial.runtime.architecture))
    while walk.here.outcome.macs > least * (1 - TOO_FAR) or walk.here is _best_stop(walk):
        if not walk.onward():
            break
    return walk


def _up(trial: Trial, base: Offsets, most: float) -> Walk:
    """From a base to the largest budget, if that is more than the trained policy takes."""
    most, trained = most * _part(trial, SOME), trial.run(TRAINED, SOME).macs
    step = 2 * max(STEP, (most - trained) / STEPS)
    walk = Walk(trial, base, +1, step, moves_by_kind(trial.runtime.architecture), SOME)
    while trained < most and walk.here.outcome.macs < most * (1 + TOO_FAR):
        if not walk.onward():
            break
    return walk


def _part(trial: Trial, count: int) -> float:
    """The MACs of some images relative to those of all, as the trained policy has them."""
    return trial.run(TRAINED, count).macs / trial.trained.macs


def _best_stop(walk: Walk) -> Stop:
    return max(walk.stops, key=lambda stop: stop.outcome.score)


def _roughly(trial: Trial, line: Line, level: float) -> Stop:
    """Where a line takes about so many MACs, on some images."""
    return meet(trial, line, level, SOME, ROUGHLY)


def _place(trial: Trial, walk: Walk, level: float) -> Stop:
    """Where a walk takes so many MACs, or its end where it does not."""
    stops, here = sorted(walk.stops, key=lambda stop: stop.outcome.macs), level * _part(trial, walk.compared)
    for low, high in pairwise(stops):
        if low.outcome.macs <= here <= high.outcome.macs:
            return _roughly(trial, Line(partial(low.offsets.toward, high.offsets), (0.0, 1.0)), level)
    end = min(stops, key=lambda stop: abs(stop.outcome.macs - here))
    return Stop(end.offsets, trial.run(end.offsets, SOME))


def _better(stops: Sequence[Stop], level: float) -> Stop:
    """The stop that surely scores best: the first, unless another's lead is more than one standard error of it.

    Of those near to a budget, since more MACs would be an unfair advantage; or the nearest.
    """
    nearest = min(abs(stop.outcome.macs - level) for stop in stops)
    close = [stop for stop in stops if abs(stop.outcome.macs - level) <= max(nearest, TOO_FAR * level)]
    first = close[0].outcome
    return max(close, key=lambda stop: stop.outcome.score - stop.outcome.doubt(first))
