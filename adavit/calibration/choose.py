"""For each of some budgets, the offsets that score best of a few that two walks suggest.

One walk goes down from the trained policy, the other up, from where the first scores best: what loses nothing is given
up for what gains. A walk takes one step at a time, so it can spend early what it misses later. So at each budget its
place is compared with the trained policy and with the best stop of the first walk, both moved evenly to as many MACs,
and then with what was found for the neighbouring budgets. In the end all images run: the trained policy moved evenly
is taken where the other is not surely better.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from adavit.calibration.decisions import units_of
from adavit.calibration.meet import Line, Stop, even, meet
from adavit.calibration.trial import Trial
from adavit.calibration.walk import COMPARED, Walk
from adavit.calibration.work import Work
from adavit.runtime.budget import TRAINED, Offsets

__all__ = ["best_stops", "expected"]

STEP = 0.015
"""Least share of the dense MACs that a step down takes; one up takes twice as much, since there is less to win."""
STEPS = 8
"""About how many steps go down to the least budget; half as many go up."""
ROUGHLY = 0.008
"""How near to a budget the MACs are to be, relative to it, where settings are compared on some images."""
TOO_FAR = 0.02
"""How far a stop may be from a budget, relative to it, to be compared with others."""


def expected(trial: Trial, budgets: int) -> list[float]:
    """About how many images the parts of a search run: two walks, each budget, all of them, and between them."""
    some, units = min(COMPARED, len(trial)), len(units_of(trial.runtime.architecture))
    walks = [some * (0.7 * units + 3 * steps) for steps in (STEPS, STEPS / 2)]
    return [*walks, *[9.0 * some] * budgets, budgets * (4.0 * some + 2 * len(trial)), float(budgets * len(trial))]


def best_stops(trial: Trial, budgets: Sequence[float], work: Work) -> dict[float, Stop]:
    """By ascending budget, the offsets that score best there, and what they do on all images."""
    budgets = sorted(budgets)
    part = trial.run(TRAINED, COMPARED).macs / trial.trained.macs  # of the MACs of all, what some images take
    work.begin()
    down = _down(trial, budgets[0] * part)
    base = _best_stop(down).offsets
    work.begin()
    up = _up(trial, base, budgets[-1] * part)
    lines = {offsets: even(trial, offsets) for offsets in (TRAINED, base)}
    evens, found = {}, {}
    for level in budgets:
        work.begin()
        evens[level], other = (_roughly(trial, line, level) for line in (lines[TRAINED], lines[base]))
        place = _place(trial, down if level < trial.trained.macs else up, level, part)
        found[level] = _better([evens[level], other, place], level * part)
    work.begin()
    for order in (budgets, budgets[::-1]):
        for source, level in pairwise(order):
            moved = _roughly(trial, even(trial, found[source].offsets), level)
            found[level] = _better([found[level], moved], level * part)
    return {level: _on_all(trial, [evens[level], found[level]], level) for level in budgets}


def _on_all(trial: Trial, stops: Sequence[Stop], level: float) -> Stop:
    """The best of some stops as all images tell, moved evenly to the budget."""
    best = _better([Stop(stop.offsets, trial.run(stop.offsets)) for stop in stops], level)
    return meet(trial, even(trial, best.offsets), level)


def _down(trial: Trial, least: float) -> Walk:
    """From the trained policy to so few MACs on some images, and in any case until a step loses some score."""
    walk = Walk(trial, TRAINED, -1, max(STEP, (trial.trained.macs - least) / STEPS))
    while walk.here.outcome.macs > least * (1 - TOO_FAR) or walk.here is _best_stop(walk):
        if not walk.onward():
            break
    return walk


def _up(trial: Trial, base: Offsets, most: float) -> Walk:
    """From a base to so many MACs on some images, if these are more than the trained policy takes."""
    walk = Walk(trial, base, +1, 2 * max(STEP, (most - trial.trained.macs) / STEPS))
    while trial.run(TRAINED, COMPARED).macs < most and walk.here.outcome.macs < most * (1 + TOO_FAR):
        if not walk.onward():
            break
    return walk


def _best_stop(walk: Walk) -> Stop:
    return max(walk.stops, key=lambda stop: stop.outcome.score)


def _roughly(trial: Trial, line: Line, level: float) -> Stop:
    """Where a line takes about so many MACs, on some images."""
    return meet(trial, line, level, COMPARED, ROUGHLY)


def _place(trial: Trial, walk: Walk, level: float, part: float) -> Stop:
    """Where a walk takes so many MACs, or its end where it does not."""
    stops = sorted(walk.stops, key=lambda stop: stop.outcome.macs)
    for low, high in pairwise(stops):
        if low.outcome.macs <= level * part <= high.outcome.macs:
            return _roughly(trial, Line(partial(low.offsets.toward, high.offsets), (0.0, 1.0)), level)
    return min(stops, key=lambda stop: abs(stop.outcome.macs - level * part))


def _better(stops: Sequence[Stop], level: float) -> Stop:
    """The stop that surely scores best: the first, unless another's lead is more than one standard error of it.

    Of those near to a budget, since more MACs would be an unfair advantage; or the nearest.
    """
    nearest = min(abs(stop.outcome.macs - level) for stop in stops)
    close = [stop for stop in stops if abs(stop.outcome.macs - level) <= max(nearest, TOO_FAR * level)]
    first = close[0].outcome
    return max(close, key=lambda stop: stop.outcome.score - stop.outcome.doubt(first))
