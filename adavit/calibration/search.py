"""For each of some budgets, the offsets that score best of a few that two walks suggest.

One walk goes down from the trained policy, kind by kind and block by block. The other goes up from where the first
scores best: what loses nothing is given up for what gains. There is little to win above the trained policy, so steps up
change a kind in all blocks. A walk takes one step at a time, so it can spend early what it misses later. So at each
budget its place is compared with the trained policy and with the best point of the first walk, both moved evenly to as
many MACs, and then with what was found for the neighbouring budgets. In the end all images run: the trained policy
moved evenly is taken where the other is not surely better.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.calibration.decisions import units_of
from adavit.calibration.greedy_walk import COMPARED, GreedyWalk, moves_by_kind, moves_by_unit
from adavit.calibration.line_search import FoundPoint, Line, even_line, point_at_macs
from adavit.calibration.offset_evaluator import OffsetEvaluator
from adavit.calibration.search_progress import SearchProgress

__all__ = ["best_points", "expected"]

STEP = 0.015
"""Least share of the dense MACs that a step down takes; one up takes twice as much, since there is less to win."""
STEPS = 8
"""About how many steps go down to the least budget; half as many go up."""
SOME, ROUGHLY = 256, 0.01
"""Images that settings and steps up are compared on, and how near to a budget their MACs are to be, relative to it."""
TOO_FAR = 0.02
"""How far a point may be from a budget, relative to it, to be compared with others."""


def expected(evaluator: OffsetEvaluator, budgets: int) -> list[float]:
    """About how many images the parts of a search run: two walks, each budget, all of them, and between them."""
    every, some = len(evaluator), min(SOME, len(evaluator))
    compared, units = min(COMPARED, every), len(units_of(evaluator.runtime.architecture))
    walks = [compared * (0.45 * units + 2.5 * STEPS), some * (2.0 + 1.5 * STEPS)]
    return [*walks, *[6.0 * some] * budgets, budgets * (2.0 * some + 2 * every), budgets * (2.0 * compared + every)]


def best_points(
    evaluator: OffsetEvaluator, budgets: Sequence[float], progress: SearchProgress
) -> dict[float, FoundPoint]:
    """By ascending budget, the offsets that score best there, and what they do on all images."""
    budgets = sorted(budgets)
    progress.begin()
    down = _down(evaluator, budgets[0])
    base = _best_point(down).offsets
    progress.begin()
    up = _up(evaluator, base, budgets[-1])
    part = _part(evaluator, SOME)
    lines = {offsets: even_line(evaluator, offsets) for offsets in (TRAINED, base)}
    evens: dict[float, list[FoundPoint]] = {}
    found: dict[float, FoundPoint] = {}
    for level in budgets:
        progress.begin()
        evens[level] = [_roughly(evaluator, line, level) for line in lines.values()]
        place = point_on_walk(evaluator, down if level < evaluator.trained.macs else up, level)
        found[level] = _better([*evens[level], place], level * part)
    progress.begin()
    for order in (budgets, budgets[::-1]):
        for source, level in pairwise(order):
            if found[source] in evens[source]:
                continue  # the same, moved evenly, was compared
            moved = _roughly(evaluator, even_line(evaluator, found[source].offsets), level)
            found[level] = _better([found[level], moved], level * part)
    return {level: _on_all(evaluator, [evens[level][0], found[level]], level) for level in budgets}


def _on_all(evaluator: OffsetEvaluator, points: Sequence[FoundPoint], level: float) -> FoundPoint:
    """The best of some points as all images tell, moved evenly to the budget."""
    best = _better([FoundPoint(point.offsets, evaluator.run(point.offsets)) for point in points], level)
    return point_at_macs(evaluator, even_line(evaluator, best.offsets), level)


def _down(evaluator: OffsetEvaluator, least: float) -> GreedyWalk:
    """From the trained policy to the least budget, and in any case until a step loses some score."""
    least *= _part(evaluator, COMPARED)
    step = max(STEP, (evaluator.run(TRAINED, COMPARED).macs - least) / STEPS)
    walk = GreedyWalk(evaluator, TRAINED, -1, step, moves_by_unit(evaluator.runtime.architecture))
    while walk.last.outcome.macs > least * (1 - TOO_FAR) or walk.last is _best_point(walk):
        if not walk.step():
            break
    return walk


def _up(evaluator: OffsetEvaluator, base: Offsets, most: float) -> GreedyWalk:
    """From a base to the largest budget, if that is more than the trained policy takes."""
    most, trained = most * _part(evaluator, SOME), evaluator.run(TRAINED, SOME).macs
    step = 2 * max(STEP, (most - trained) / STEPS)
    walk = GreedyWalk(evaluator, base, +1, step, moves_by_kind(evaluator.runtime.architecture), SOME)
    while trained < most and walk.last.outcome.macs < most * (1 + TOO_FAR):
        if not walk.step():
            break
    return walk


def _part(evaluator: OffsetEvaluator, count: int) -> float:
    """The MACs of some images relative to those of all, as the trained policy has them."""
    return evaluator.run(TRAINED, count).macs / evaluator.trained.macs


def _best_point(walk: GreedyWalk) -> FoundPoint:
    return max(walk.points, key=lambda point: point.outcome.score)


def _roughly(evaluator: OffsetEvaluator, line: Line, level: float) -> FoundPoint:
    """Where a line takes about so many MACs, on some images."""
    return point_at_macs(evaluator, line, level, SOME, ROUGHLY)


def point_on_walk(evaluator: OffsetEvaluator, walk: GreedyWalk, level: float) -> FoundPoint:
    """Where a walk takes so many MACs, or its end where it does not."""
    points, here = sorted(walk.points, key=lambda point: point.outcome.macs), level * _part(evaluator, walk.compared)
    for low, high in pairwise(points):
        if low.outcome.macs <= here <= high.outcome.macs:
            return _roughly(evaluator, Line(partial(low.offsets.toward, high.offsets), (0.0, 1.0)), level)
    end = min(points, key=lambda point: abs(point.outcome.macs - here))
    return FoundPoint(end.offsets, evaluator.run(end.offsets, SOME))


def _better(points: Sequence[FoundPoint], level: float) -> FoundPoint:
    """The point that surely scores best: the first, unless another's lead is more than one standard error of it.

    Of those near to a budget, since more MACs would be an unfair advantage; or the nearest.
    """
    nearest = min(abs(point.outcome.macs - level) for point in points)
    close = [point for point in points if abs(point.outcome.macs - level) <= max(nearest, TOO_FAR * level)]
    first = close[0].outcome
    return max(close, key=lambda point: point.outcome.score - point.outcome.standard_error(first))
