"""The way from the trained policy to smaller and larger budgets: at every step, by the decisions that lose least.

A *unit* is the decisions of one kind in one block. A step changes the offset of one unit, or of all alike, so far that
the mean MACs move by about `STEP` or `EVEN_STEP` of the dense ones. It is the one that costs the least score per MAC
(or gains the most), after one standard error of that difference: differences of single units are small, and the best of
many noisy ones would often be a lucky one. A step of the same unit is tried again only when what it was worth the last
time is still the best, so that most steps take one or two trials.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from adavit.architecture import Architecture
from adavit.calibration.trial import Outcome, Trial
from adavit.runtime.budget import MAX_OFFSET, TRAINED, Offsets
from adavit.runtime.compare import KINDS

__all__ = ["EVEN_STEP", "FIRST", "STEP", "Stop", "Way", "moves_of", "shifted", "walk"]

STEP, EVEN_STEP = 0.01, 0.04
"""Shares of the dense MACs: of a step of one unit, and of all."""
NEAR = 0.5, 1.6
"""Parts of a step that are close enough to one."""
STALLED = 0.02
"""Part of a step; where a much larger offset adds less, the move is spent: all of them is kept, or dropped."""
TRIES = 8
FIRST = 0.5
"""The first change of an offset that is tried; the logits' scale is not known."""

Move = tuple[tuple[str, int], ...]
"""Units, by kind and block, whose offsets change together."""


@dataclass(frozen=True)
class Stop:
    """Offsets on the way, what they did, and whether the move that led here is spent."""

    offsets: Offsets
    outcome: Outcome
    spent: bool = False

    def worth(self, before: Stop, sign: int) -> float:
        """What the step to here surely won of the score, per MAC: less one standard error."""
        won = self.outcome.score - before.outcome.score
        return (won - self.outcome.doubt(before.outcome)) / (sign * (self.outcome.macs - before.outcome.macs))


@dataclass(frozen=True)
class Way:
    """Stops by ascending MACs; the offsets of each are no smaller than those of the one before."""

    stops: tuple[Stop, ...]

    def offsets(self, position: float) -> Offsets:
        """The offsets at a position, on the straight line between two stops."""
        low = min(int(position), len(self.stops) - 2)
        return self.stops[low].offsets.toward(self.stops[low + 1].offsets, position - low)


def walk(trial: Trial, lowest: float, highest: float) -> Way:
    """A way through the trained policy that reaches from `lowest` to `highest`, shares of the dense MACs.

    Args:
        trial: scores offsets.
        lowest: where it may end,
        highest: and where on the other side.
    """
    start = Stop(TRAINED, trial.search(TRAINED))
    moves = moves_of(trial.runtime.architecture)
    down, up = _leg(trial, start, lowest, -1, moves), _leg(trial, start, highest, +1, moves)
    return Way((*reversed(down), start, *up))


def _leg(trial: Trial, start: Stop, end: float, sign: int, moves: list[Move]) -> list[Stop]:
    """The stops behind `start` until the MACs are beyond `end`, or can go no further."""
    sizes = dict.fromkeys(moves, FIRST)
    values = dict.fromkeys(sizes, float("inf"))
    stops: list[Stop] = []
    here = start
    while sign * (end - here.outcome.macs) > 0:
        fresh: dict[Move, Stop] = {}
        while values and (move := max(values, key=lambda move: values[move])) not in fresh:
            found = _step(trial, here, move, sizes, sign)
            if found is None:
                values = _without(move, values)
            else:
                fresh[move] = found
                values[move] = found.worth(here, sign)
        if not values:
            break
        here = fresh[move]
        stops.append(here)
        if here.spent:
            values = _without(move, values)
    return stops


def _without(spent: Move, values: dict[Move, float]) -> dict[Move, float]:
    """The moves that go on where one can go no further."""
    return {move: value for move, value in values.items() if not set(move) <= set(spent)}


def moves_of(arch: Architecture) -> list[Move]:
    """What a step may change: each unit that there is, and, the last, all of them."""
    units = [("tokens", block) for block in range(arch.depth) if arch.token_policy]
    for block in range(arch.depth):
        units += [("heads", block)] * arch.adapts_heads(block) + [("sublayers", block)] * arch.adapts_sublayers(block)
    return [*((unit,) for unit in units), *([tuple(units)] if len(units) > 1 else [])]


def shifted(offsets: Offsets, depth: int, move: Move, by: float) -> Offsets:
    """The offsets with those of some units changed, within their bounds."""
    values = dict(zip(KINDS, map(list, offsets.by_block(depth)), strict=True))
    for kind, block in move:
        values[kind][block] = min(MAX_OFFSET, max(-MAX_OFFSET, values[kind][block] + by))
    return replace(offsets, **{kind: values[kind] for kind, _ in move})


def _step(trial: Trial, here: Stop, move: Move, sizes: dict[Move, float], sign: int) -> Stop | None:
    """About a step further by some units, or as far as it goes; None where it does not go any further.

    `sizes` holds the change of offsets that was last right, and is where the search for it begins. Few images tell
    how far a change goes.
    """
    depth = trial.runtime.architecture.depth
    step, before = EVEN_STEP if len(move) > 1 else STEP, trial.size(here.offsets).macs
    small, large = 0.0, float("inf")
    size, best, right, reached, spent = sizes[move], None, 0.0, 0.0, False
    for _ in range(TRIES):
        offsets = shifted(here.offsets, depth, move, sign * size)
        moved = sign * (trial.size(offsets).macs - before) / step
        if moved > reached + STALLED or NEAR[0] <= moved <= NEAR[1]:
            best, right, reached = offsets, size, moved
        elif best is not None and large == float("inf"):
            spent = True
            break
        if NEAR[0] <= moved <= NEAR[1] or (moved < NEAR[0] and size >= MAX_OFFSET):
            break
        small, large = (size, large) if moved < NEAR[0] else (small, size)
        guess = size * min(8.0, max(0.125, 1 / max(moved, 1e-9)))
        size = min(MAX_OFFSET, guess if small < guess < large else (small + large) / 2)
    if best is None:
        return None
    sizes[move] = right
    found = Stop(best, trial.search(best), spent)
    return found if sign * (found.outcome.macs - here.outcome.macs) > 0 else None
