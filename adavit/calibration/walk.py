"""The way from the trained policy to smaller and larger budgets: at every step, by the kinds that lose least.

A step changes the offset of one kind, or of all alike, so far that the mean MACs move by about `STEP` of the dense
ones; it is the one that costs the least score per MAC (or gains the most). Returns diminish, so a step of the same
kinds is tried again only when what it was worth the last time is still the best: most take one or two trials.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from adavit.architecture import Architecture
from adavit.calibration.trial import Outcome, Trial
from adavit.runtime.budget import MAX_OFFSET, TRAINED, Offsets

__all__ = ["STEP", "Stop", "Way", "walk"]

STEP = 0.04
"""Share of the dense MACs."""
NEAR = 0.5, 1.6
"""Parts of a step that are close enough to one."""
STALLED = 0.02
"""Part of a step; where a much larger offset adds less, the kinds are spent: all of them is kept, or dropped."""
TRIES = 8
FIRST = 0.5
"""The first change of an offset that is tried; the logits' scale is not known."""

Kinds = tuple[str, ...]
"""Those whose offsets change together."""


@dataclass(frozen=True)
class Stop:
    """Offsets on the way, what they did, and whether the kinds that were changed last are spent."""

    offsets: Offsets
    outcome: Outcome
    spent: bool = False


@dataclass(frozen=True)
class Way:
    """Stops by ascending MACs; the offsets of each are no smaller than those of the one before."""

    stops: tuple[Stop, ...]

    def at(self, macs: float) -> float:
        """The position, in stops, where the way takes so many MACs, as far as it goes."""
        return float(np.interp(macs, [stop.outcome.macs for stop in self.stops], range(len(self.stops))))

    def offsets(self, position: float) -> Offsets:
        """The offsets at a position, on the straight line between two stops."""
        low = min(int(position), len(self.stops) - 2)
        return self.stops[low].offsets.toward(self.stops[low + 1].offsets, position - low)


def walk(trial: Trial, lowest: float, highest: float, even: bool = False) -> Way:
    """A way through the trained policy that reaches from `lowest` to `highest`, shares of the dense MACs.

    Args:
        trial: scores offsets.
        lowest: where it may end,
        highest: and where on the other side.
        even: change all kinds alike, instead of choosing.
    """
    start = Stop(TRAINED, trial.search(TRAINED))
    moves = _moves(trial.runtime.architecture)[-1 if even else 0 :]
    down, up = _leg(trial, start, lowest, -1, moves), _leg(trial, start, highest, +1, moves)
    return Way((*reversed(down), start, *up))


def _leg(trial: Trial, start: Stop, end: float, sign: int, moves: list[Kinds]) -> list[Stop]:
    """The stops behind `start` until the MACs are beyond `end`, or can go no further."""
    sizes = dict.fromkeys(moves, FIRST)
    values = dict.fromkeys(sizes, float("inf"))
    stops: list[Stop] = []
    here = start
    while sign * (end - here.outcome.macs) > 0:
        fresh: dict[Kinds, Stop] = {}
        while values and (kinds := max(values, key=lambda kinds: values[kinds])) not in fresh:
            found = _step(trial, here, kinds, sizes, sign)
            if found is None:
                values = _without(kinds, values)
            else:
                fresh[kinds] = found
                moved = sign * (found.outcome.macs - here.outcome.macs)
                values[kinds] = (found.outcome.score - here.outcome.score) / moved
        if not values:
            break
        here = fresh[kinds]
        stops.append(here)
        if here.spent:
            values = _without(kinds, values)
    return stops


def _without(kinds: Kinds, values: dict[Kinds, float]) -> dict[Kinds, float]:
    """The moves that do not contain these kinds, which can go no further."""
    return {move: value for move, value in values.items() if not set(kinds) <= set(move)}


def _moves(arch: Architecture) -> list[Kinds]:
    """What a step may change: each kind that there is, and all of them."""
    there = {"tokens": arch.token_policy, "heads": arch.head_policy, "sublayers": arch.sublayer_policy}
    every = tuple(kind for kind, adapted in there.items() if adapted)
    return [*((kind,) for kind in every), *([every] if len(every) > 1 else [])]


def _step(trial: Trial, here: Stop, kinds: Kinds, sizes: dict[Kinds, float], sign: int) -> Stop | None:
    """About a step further by some kinds, or as far as it goes; None where it does not go any further.

    `sizes` holds the change of offsets that was last right, and is where the search for it begins.
    """
    old = {kind: getattr(here.offsets, kind) for kind in kinds}
    room = min(MAX_OFFSET - sign * offset for offset in old.values())
    small, large = 0.0, float("inf")
    size, best, right, reached = min(sizes[kinds], room), None, 0.0, 0.0
    for _ in range(TRIES):
        offsets = replace(here.offsets, **{kind: offset + sign * size for kind, offset in old.items()})
        found = Stop(offsets, trial.search(offsets))
        moved = sign * (found.outcome.macs - here.outcome.macs) / STEP
        if moved > reached + STALLED or NEAR[0] <= moved <= NEAR[1]:
            best, right, reached = found, size, moved
        elif best is not None and large == float("inf"):
            best = replace(best, spent=True)
            break
        if NEAR[0] <= moved <= NEAR[1] or (moved < NEAR[0] and size == room):
            break
        small, large = (size, large) if moved < NEAR[0] else (small, size)
        guess = size * min(8.0, max(0.125, 1 / max(moved, 1e-9)))
        size = min(room, guess if small < guess < large else (small + large) / 2)
    if best is not None:
        sizes[kinds] = right
    return best
