"""The way from the trained policy to smaller and larger budgets: at every step, by the kind that loses least.

A step changes the offset of one kind so far that the mean MACs move by about `STEP` of the dense ones, and the
kind is the one whose step costs the least score per MAC (or gains the most). Returns diminish, so the step of a kind
is tried again only when what it was worth the last time is still the best: most steps take one or two trials.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from adavit.architecture import Architecture
from adavit.calibration.trial import Outcome, Trial
from adavit.runtime.budget import MAX_OFFSET, TRAINED, Offsets

__all__ = ["Way", "walk"]

STEP = 0.04
"""Share of the dense MACs."""
NEAR = 0.5, 1.6
"""Parts of a step that are close enough to one."""
STALLED = 0.02
"""Part of a step; where a much larger offset adds less, the kind is spent: all of it is kept, or dropped."""
TRIES = 8
FIRST = 0.5
"""The first change of an offset that is tried; the logits' scale is not known."""


@dataclass(frozen=True)
class Stop:
    """Offsets on the way, what they did, and whether the kind that was changed last is spent."""

    offsets: Offsets
    outcome: Outcome
    spent: bool = False


@dataclass(frozen=True)
class Way:
    """Stops by ascending MACs, each different from the next by one kind's offset."""

    stops: tuple[Stop, ...]

    @property
    def last(self) -> float:
        """The position of the last stop."""
        return len(self.stops) - 1.0

    def at(self, macs: float) -> float:
        """The position, in stops, where the way takes so many MACs, as far as it goes."""
        return float(np.interp(macs, [stop.outcome.macs for stop in self.stops], range(len(self.stops))))

    def macs(self, position: float) -> float:
        """About the MACs at a position, as the search found them."""
        return float(np.interp(position, range(len(self.stops)), [stop.outcome.macs for stop in self.stops]))

    def offsets(self, position: float) -> Offsets:
        """The offsets at a position, on the straight line between two stops."""
        low = min(int(position), len(self.stops) - 2)
        return self.stops[low].offsets.toward(self.stops[low + 1].offsets, position - low)


def walk(trial: Trial, lowest: float, highest: float) -> Way:
    """The way through the trained policy that reaches from `lowest` to `highest`, shares of the dense MACs."""
    start = Stop(TRAINED, trial.search(TRAINED))
    down, up = _leg(trial, start, lowest, -1), _leg(trial, start, highest, +1)
    return Way((*reversed(down), start, *up))


def _leg(trial: Trial, start: Stop, end: float, sign: int) -> list[Stop]:
    """The stops behind `start` until the MACs are beyond `end`, or can go no further."""
    sizes = dict.fromkeys(_kinds(trial.runtime.architecture), FIRST)
    values = dict.fromkeys(sizes, float("inf"))
    stops: list[Stop] = []
    here = start
    while sign * (end - here.outcome.macs) > 0:
        fresh: dict[str, Stop] = {}
        while values and (kind := max(values, key=lambda name: values[name])) not in fresh:
            found = _step(trial, here, kind, sizes, sign)
            if found is None:
                del values[kind]
            else:
                fresh[kind] = found
                moved = sign * (found.outcome.macs - here.outcome.macs)
                values[kind] = (found.outcome.score - here.outcome.score) / moved
        if not values:
            break
        here = fresh[kind]
        stops.append(here)
        if here.spent:
            del values[kind]
    return stops


def _kinds(arch: Architecture) -> list[str]:
    there = {"tokens": arch.token_policy, "heads": arch.head_policy, "sublayers": arch.sublayer_policy}
    return [kind for kind, adapted in there.items() if adapted]


def _step(trial: Trial, here: Stop, kind: str, sizes: dict[str, float], sign: int) -> Stop | None:
    """About a step further by one kind, or as far as it goes; None where it does not go any further.

    `sizes` holds each kind's change of offset that was last right, and is where the search for it begins.
    """
    old = getattr(here.offsets, kind)
    room = MAX_OFFSET - sign * old
    small, large = 0.0, float("inf")
    size, best, reached = min(sizes[kind], room), None, 0.0
    for _ in range(TRIES):
        offsets = replace(here.offsets, **{kind: old + sign * size})
        found = Stop(offsets, trial.search(offsets))
        moved = sign * (found.outcome.macs - here.outcome.macs) / STEP
        if moved > reached + STALLED or NEAR[0] <= moved <= NEAR[1]:
            best, reached = found, moved
        elif best is not None and large == float("inf"):
            best = replace(best, spent=True)
            break
        if NEAR[0] <= moved <= NEAR[1] or (moved < NEAR[0] and size == room):
            break
        small, large = (size, large) if moved < NEAR[0] else (small, size)
        guess = size * min(8.0, max(0.125, 1 / max(moved, 1e-9)))
        size = min(room, guess if small < guess < large else (small + large) / 2)
    if best is not None:
        sizes[kind] = abs(getattr(best.offsets, kind) - old)
    return best
