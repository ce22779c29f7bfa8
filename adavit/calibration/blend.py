"""Between two ways to smaller and larger budgets, the offsets that score best at each budget.

The walk by what loses least takes one step at a time, so it can spend early what it misses later; the even way, which
moves all kinds alike, never chooses. At every budget, both and offsets between them are tried on all images. Of these,
the chain from the trained policy outwards is taken that scores best in sum while no offset ever turns back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from adavit.calibration.trial import Trial
from adavit.calibration.walk import Stop, Way, walk
from adavit.runtime.budget import TRAINED, Offsets

__all__ = ["best_way"]

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the even way, in the offsets that are tried."""


@dataclass(frozen=True)
class Chain:
    """Stops outwards from the trained policy, and the sum of their scores."""

    stops: tuple[Stop, ...]
    score: float = 0.0

    def joins(self, stop: Stop, sign: int) -> bool:
        """Whether a stop lies further out than the last one, in its MACs and, if they differ, in every offset."""
        last = self.stops[-1]
        steps = zip(astuple(last.offsets), astuple(stop.offsets), strict=True)
        further = sign * (stop.outcome.macs - last.outcome.macs) > 0
        return further and all(sign * (new - old) >= 0 for old, new in steps)


def best_way(trial: Trial, budgets: Sequence[float], lowest: float, highest: float) -> Way:
    """The way through the trained policy from `lowest` to `highest` that scores best at the budgets between them."""
    ways = walk(trial, lowest, highest), walk(trial, lowest, highest, even=True)
    start = Chain((Stop(TRAINED, trial.trained),))
    down = [budget for budget in sorted(budgets, reverse=True) if budget < trial.trained.macs]
    up = [budget for budget in sorted(budgets) if budget > trial.trained.macs]
    low, high = _chain(trial, ways, start, down, -1), _chain(trial, ways, start, up, +1)
    return Way((*reversed(low), *start.stops, *high))


def _chain(trial: Trial, ways: tuple[Way, Way], start: Chain, budgets: list[float], sign: int) -> tuple[Stop, ...]:
    """The stops of the best chain at the budgets, given outwards, and where both ways end."""
    levels = [(budget, tuple(way.offsets(way.at(budget)) for way in ways)) for budget in budgets]
    if levels:
        ends = tuple(way.stops[-1 if sign > 0 else 0].offsets for way in ways)
        levels.append((budgets[-1], ends))
    chains = [start]
    for budget, (first, second) in levels:
        chains = [
            Chain((*best.stops, stop), best.score + _score(trial, stop, budget))
            for stop in _stops(trial, first, second)
            if (best := max((c for c in chains if c.joins(stop, sign)), key=lambda c: c.score, default=None))
        ] or chains
    return max(chains, key=lambda chain: chain.score).stops[1:]


def _stops(trial: Trial, first: Offsets, second: Offsets) -> list[Stop]:
    offsets = dict.fromkeys(first.toward(second, share) for share in SHARES)
    return [Stop(found, trial.run(found)) for found in offsets]


def _score(trial: Trial, stop: Stop, budget: float) -> float:
    """A stop's score at the MACs of a budget near its own, as the score falls from the trained policy to it."""
    found, trained = stop.outcome, trial.trained
    slope = (trained.score - found.score) / (trained.macs - found.macs)
    return found.score + slope * (budget - found.macs)
