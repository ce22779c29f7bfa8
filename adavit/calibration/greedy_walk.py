"""Steps from the trained policy to smaller or larger budgets: each by the decisions that lose least.

A *unit* is the decisions of one kind in one block. A step changes the offset of some units alike, as far as the
recorded logits predict that it takes a step's MACs. The step is taken that costs the least score per MAC (or gains the
most), after one standard error of that difference: the best of many noisy ones would often be a lucky one. A step is
tried again only when its last value is still the best. It runs few images first, and the others only if it may be the
best. Of all these, only the images run for which a decision changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import inf

from adavit.architecture import Architecture
from adavit.bundle.operating_points import Offsets
from adavit.calibration.decisions import Decisions, Unit, shifted, units_of
from adavit.calibration.line_search import FoundPoint, crossing
from adavit.calibration.offset_evaluator import OffsetEvaluator, Outcome

__all__ = ["COMPARED", "GreedyWalk", "Move", "moves_by_kind", "moves_by_unit"]

COMPARED, FIRST = 512, 128
"""Images that steps are compared on by default, and how many of them run first."""
LEAST = 0.1
"""Part of a step that must be left of a unit, and that a step must bring."""

Move = tuple[Unit, ...]
"""What a step changes."""


def moves_by_unit(arch: Architecture) -> list[Move]:
    """Each unit alone, and all of them."""
    units = units_of(arch)
    return _with_all([(unit,) for unit in units], units)


def moves_by_kind(arch: Architecture) -> list[Move]:
    """Each kind of decision in all blocks, and all of them."""
    units = units_of(arch)
    return _with_all([tuple(group) for _, group in groupby(sorted(units), key=lambda unit: unit[0])], units)


def _with_all(moves: list[Move], units: list[Unit]) -> list[Move]:
    return [*moves, tuple(units)] if len(moves) > 1 else moves


class GreedyWalk:
    """A walk in one direction.

    Args:
        evaluator: runs offsets.
        start: where it begins.
        sign: -1 to smaller budgets, 1 to larger.
        step: share of the dense MACs that a step is to take.
        moves: what steps may change.
        compared: images that steps are compared on.

    Attributes:
        points: where it has been, the start first, as `compared` images tell.
        compared: as given.
    """

    def __init__(
        self,
        evaluator: OffsetEvaluator,
        start: Offsets,
        sign: int,
        step: float,
        moves: Sequence[Move],
        compared: int = COMPARED,
    ) -> None:
        self._evaluator, self._sign, self._step, self.compared = evaluator, sign, step, compared
        self._values = dict.fromkeys(moves, inf)
        self._answers = dict.fromkeys(moves, 1.0)  # the MACs that the last step took, relative to the prediction
        self._predicted = dict.fromkeys(moves, 0.0)
        self.points = [FoundPoint(start, evaluator.run(start, compared))]

    def step(self) -> bool:
        """Takes the best step; returns whether there is one."""
        decisions = self._evaluator.record(self.last.offsets, self.compared)
        fresh: dict[Move, Offsets] = {}
        while self._values:
            move = max(self._values, key=lambda move: self._values[move])
            if move in fresh:
                self.points.append(FoundPoint(fresh[move], self._evaluator.run(fresh[move], self.compared, decisions)))
                return True
            offsets = self._further(move, decisions)
            least = max((self._values[other] for other in fresh), default=-inf)
            value = None if offsets is None else self._value(move, offsets, decisions, least)
            if offsets is None or value is None:
                del self._values[move]
            else:
                fresh[move], self._values[move] = offsets, value
        return False

    @property
    def last(self) -> FoundPoint:
        """The last point."""
        return self.points[-1]

    def gain_per_macs(self, there: Outcome, standard_errors: float = -1.0) -> float:
        """The score that a step there wins, per MAC, and some standard errors of it."""
        count = None if there.scores is None else len(there.scores)
        here = self._evaluator.run(self.last.offsets, count)
        return (there.score - here.score + standard_errors * there.standard_error(here)) / abs(there.macs - here.macs)

    def _further(self, move: Move, decisions: Decisions) -> Offsets | None:
        """About a step further, or as far as it goes; None where that is too little."""
        before, step = decisions.macs(decisions.offsets), self._step / self._answers[move]
        by = _change(decisions, move, self._sign, before + self._sign * step)
        offsets = shifted(decisions.offsets, decisions.arch.depth, dict.fromkeys(move, by))
        self._predicted[move] = self._sign * (decisions.macs(offsets) - before)
        return None if self._predicted[move] < LEAST * self._step else offsets

    def _value(self, move: Move, offsets: Offsets, decisions: Decisions, least: float) -> float | None:
        """What a step surely wins, on few images if that is below `least` at best; None where it goes no further."""
        value = -inf
        for count in (FIRST, self.compared):
            found = self._evaluator.run(offsets, count, decisions)
            went = self._sign * (found.macs - self._evaluator.run(self.last.offsets, count).macs)
            self._answers[move] = min(2.0, max(0.25, went / self._predicted[move]))
            if went < LEAST * self._step:
                return None
            value = self.gain_per_macs(found)
            if self.gain_per_macs(found, 1.0) < least:
                break
        return value


def _change(decisions: Decisions, move: Move, sign: int, macs: float) -> float:
    """The change of some units' offsets that is predicted to take so many MACs, as far as there are any."""
    reaches = [decisions.reach(unit) for unit in move]
    ends = (min(low for low, _ in reaches), 0.0) if sign < 0 else (0.0, max(high for _, high in reaches))
    depth = decisions.arch.depth

    def predicted(by: float) -> float:
        return decisions.macs(shifted(decisions.offsets, depth, dict.fromkeys(move, by)))

    return crossing(predicted, *ends, macs)
