"""Steps from the trained policy to smaller or larger budgets: each by the decisions that lose least.

A *unit* is the decisions of one kind in one block. A step changes the offset of one unit, or of all alike, as far as
the recorded logits predict that it takes a step's MACs. Only the images run for which a decision changes. The step is
taken that costs the least score per MAC (or gains the most), after one standard error of that difference: the best of
many noisy ones would often be a lucky one. A step is tried again only when what it cost the last time is still the
least.
"""

from __future__ import annotations

from adavit.calibration.decisions import Decisions, Unit, shifted, units_of
from adavit.calibration.meet import Stop, cross
from adavit.calibration.trial import Trial
from adavit.runtime.budget import Offsets

__all__ = ["COMPARED", "Walk"]

COMPARED = 256
"""Images that steps are compared on."""
LEAST = 0.1
"""Part of a step that must be left of a unit, and that a step must bring."""

Move = tuple[Unit, ...]


class Walk:
    """A walk in one direction.

    Args:
        trial: runs offsets.
        start: where it begins.
        sign: -1 to smaller budgets, 1 to larger.
        step: share of the dense MACs that a step is to take.

    Attributes:
        stops: where it has been, the start first, as some of the images tell.
    """

    def __init__(self, trial: Trial, start: Offsets, sign: int, step: float) -> None:
        self._trial, self._sign, self._step = trial, sign, step
        units = units_of(trial.runtime.architecture)
        moves: list[Move] = [*((unit,) for unit in units), *([tuple(units)] if len(units) > 1 else [])]
        self._values = dict.fromkeys(moves, float("inf"))
        self._answers = dict.fromkeys(moves, 1.0)
        self.stops = [Stop(start, trial.run(start, COMPARED))]

    def onward(self) -> bool:
        """Takes the best step; returns whether there is one."""
        decisions = self._trial.record(self.here.offsets, COMPARED)
        fresh: dict[Move, Stop] = {}
        while self._values:
            move = max(self._values, key=lambda move: self._values[move])
            if move in fresh:
                self.stops.append(fresh[move])
                return True
            stop = self._tried(move, decisions)
            if stop is None:
                del self._values[move]
            else:
                fresh[move] = stop
                self._values[move] = self.value(stop)
        return False

    @property
    def here(self) -> Stop:
        """The last stop."""
        return self.stops[-1]

    def value(self, stop: Stop) -> float:
        """The score that a step there surely wins, per MAC: less one standard error."""
        here, there = self.here.outcome, stop.outcome
        return (there.score - here.score - there.doubt(here)) / abs(there.macs - here.macs)

    def _tried(self, move: Move, decisions: Decisions) -> Stop | None:
        """About a step further, or as far as it goes; None where that is too little."""
        before = decisions.macs(decisions.offsets)
        by = _change(decisions, move, self._sign, before + self._sign * self._step / self._answers[move])
        offsets = shifted(decisions.offsets, decisions.arch.depth, dict.fromkeys(move, by))
        predicted = self._sign * (decisions.macs(offsets) - before)
        if predicted < LEAST * self._step:
            return None
        stop = Stop(offsets, self._trial.run(offsets, len(decisions), decisions))
        went = self._sign * (stop.outcome.macs - self.here.outcome.macs)
        self._answers[move] = min(2.0, max(0.25, went / predicted))
        return stop if went >= LEAST * self._step else None


def _change(decisions: Decisions, move: Move, sign: int, macs: float) -> float:
    """The change of some units' offsets that is predicted to take so many MACs, as far as there are any."""
    reaches = [decisions.reach(unit) for unit in move]
    ends = (min(low for low, _ in reaches), 0.0) if sign < 0 else (0.0, max(high for _, high in reaches))
    depth = decisions.arch.depth

    def predicted(by: float) -> float:
        return decisions.macs(shifted(decisions.offsets, depth, dict.fromkeys(move, by)))

    return cross(predicted, *ends, macs)
