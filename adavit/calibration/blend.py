"""Between two ways to smaller and larger budgets, the offsets that score best at each budget.

The walk by what loses least takes one step at a time, so it can spend early what it misses later; the even way, which
moves all decisions alike, never chooses. At every budget, and at steps between, both and offsets between them are tried
on all images. Of these, the chain from the trained policy outwards is taken that scores best in sum while no offset
ever turns back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from adavit.calibration.trial import Trial
from adavit.calibration.walk import EVEN_STEP, Stop, Way, walk
from adavit.runtime.budget import TRAINED, Offsets

__all__ = ["best_way"]

SHARES = (0, 1 / 3, 2 / 3, 1)
"""Of the even way, in the offsets that are tried."""


@dataclass(frozen=True)
class Chain:
    """Stops outwards from the trained policy, and the sum of their scores."""

    stops: tuple[Stop, ...]
    score: float = 0.0

    def joins(self, stop: Stop, sign: int, depth: int) -> bool:
        """Whether a stop lies further out than the last one, in its MACs and, if they differ, in every offset."""
        last = self.stops[-1]
        if sign * (stop.outcome.macs - last.outcome.macs) <= 0:
            return False
        before, behind = (np.asarray(offsets.by_block(depth)) for offsets in (last.offsets, stop.offsets))
        return bool((sign * (behind - before) >= 0).all())


def best_way(trial: Trial, budgets: Sequence[float], lowest: float, highest: float) -> Way:
    """The way through the trained policy from `lowest` to `highest` that scores best at the budgets between them."""
    ways = walk(trial, lowest, highest), walk(trial, lowest, highest, even=True)
    start, ascending = Stop(TRAINED, trial.trained), sorted(budgets)
    down = _chain(trial, ways, start, [budget for budget in reversed(ascending) if budget < start.outcome.macs], -1)
    up = _chain(trial, ways, start, [budget for budget in ascending if budget > start.outcome.macs], +1)
    return Way((*reversed(down), start, *up))


def _chain(trial: Trial, ways: tuple[Way, Way], start: Stop, budgets: list[float], sign: int) -> tuple[Stop, ...]:
    """The stops of the best chain from `start` through budgets, given outwards, to where both ways end."""
    depth = trial.runtime.architecture.depth
    levels = [(macs, [way.offsets(way.at(macs)) for way in ways]) for macs in _steps([start.outcome.macs, *budgets])]
    if levels:
        levels.append((budgets[-1], [way.stops[-1 if sign > 0 else 0].offsets for way in ways]))
    chains = [Chain((start,))]
    for macs, (first, second) in levels:
        chains = [
            Chain((*best.stops, stop), best.score + _score(trial, stop, macs))
            for stop in _stops(trial, first, second)
            if (best := max((c for c in chains if c.joins(stop, sign, depth)), key=lambda c: c.score, default=None))
        ] or chains
    return max(chains, key=lambda chain: chain.score).stops[1:]


def _steps(marks: list[float]) -> list[float]:
    """The marks behind the first, with others between them so that they are about a step of the even walk apart."""
    parts = [max(1, round(abs(far - near) / EVEN_STEP)) for near, far in pairwise(marks)]
    return [
        near + (far - near) * part / count
        for (near, far), count in zip(pairwise(marks), parts, strict=True)
        for part in range(1, count + 1)
    ]


def _stops(trial: Trial, first: Offsets, second: Offsets) -> list[Stop]:
    offsets = dict.fromkeys(first.toward(second, share) for share in SHARES)
    return [Stop(found, trial.run(found)) for found in offsets]


def _score(trial: Trial, stop: Stop, macs: float) -> float:
    """A stop's score at MACs near its own, as the score falls from the trained policy to it."""
    found, trained = stop.outcome, trial.trained
    slope = (trained.score - found.score) / (trained.macs - found.macs)
    return found.score + slope * (macs - found.macs)
