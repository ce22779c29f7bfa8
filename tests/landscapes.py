"""Known landscapes, which stand for the images that a search for operating points runs."""

from collections.abc import Collection
from dataclasses import replace
from math import exp
from statistics import fmean
from typing import Any

from cases import tiny

from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.calibration.offset_evaluator import Outcome

KINDS = ("tokens", "heads", "sublayers")
ALIKE = dict.fromkeys(KINDS, 1.0)
SCALES = [ALIKE, {"tokens": 0.05, "heads": 1.0, "sublayers": 30.0}]
PREDICTED = "predicted"
"""Stands for recorded logits where nothing runs."""
ASKED = [0.25, 0.4, 0.7, 0.9]


def kept(logit: float) -> float:
    """The share that is kept, a logistic function."""
    return 1 / (1 + exp(-max(-99.0, logit)))


def spread(values: Collection[float]) -> float:
    """The standard deviation."""
    mean = fmean(values)
    return fmean((value - mean) ** 2 for value in values) ** 0.5


class Landscape:
    """Stands for images: MACs and score are smooth functions of the offsets, on any scale of logits.

    What a kind keeps is the mean of what it keeps in the blocks that decide on it.

    Args:
        scales: of each kind's logits.
        worth: score that each kind loses while the share it keeps falls to zero.
        balance: score lost where the kinds do not keep the same share.
    """

    labels = None

    def __init__(self, scales: dict[str, float], importance: dict[str, float], balance: float = 0) -> None:
        self.scales, self.importance, self.balance = scales, importance, balance
        self.runtime: Any = type("Known", (), {"architecture": tiny()})
        self.progress: Any = None
        self.ran: set[Offsets] = set()
        self.trained = self.run(TRAINED)

    def kept(self, offsets: Offsets) -> dict[str, float]:
        arch = self.runtime.architecture
        chosen = zip(KINDS, offsets.by_block(arch.depth), (0, arch.keep, arch.keep), strict=True)
        return {kind: fmean(kept(value / self.scales[kind]) for value in row[first:]) for kind, row, first in chosen}

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        if like != PREDICTED:
            self.ran.add(offsets)
        kept = self.kept(offsets)
        macs = 0.1 + 0.9 * (sum(kept.values()) / 3)
        score = 1 - sum(self.importance[kind] * (1 - kept[kind]) ** 2 for kind in KINDS)
        score -= self.balance * spread(kept.values())
        return Outcome(macs, score, score, None, kept)

    def record(self, offsets: Offsets, count: int) -> "Recorded":
        return Recorded(self, offsets, count)

    def __len__(self) -> int:
        return 1000


class Recorded:
    """Stands for recorded logits, whose predictions are right where they were recorded, and else a little off."""

    def __init__(self, land: Landscape, offsets: Offsets, count: int) -> None:
        self.arch, self.offsets = land.runtime.architecture, offsets
        self._land, self._count, self._here = land, count, land.run(offsets, count).macs

    def macs(self, offsets: Offsets, count: int | None = None) -> float:
        return float(self._here * (self._land.run(offsets, self._count, PREDICTED).macs / self._here) ** 1.2)

    def reach(self, unit: Any) -> tuple[float, float]:
        kind, block = unit
        here = self.offsets.by_block(self.arch.depth)[KINDS.index(kind)][block]
        return min(0.0, -9 * self._land.scales[kind] - here), max(0.0, 9 * self._land.scales[kind] - here)

    def __len__(self) -> int:
        return self._count


class Part(Landscape):
    """Some of the images take other MACs than all of them, by a factor and a power."""

    def __init__(self, part: float, power: float = 1.0) -> None:
        self.part, self.power = part, power
        super().__init__(ALIKE, ALIKE)

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        found = super().run(offsets, count, like)
        return found if count in (None, len(self)) else replace(found, macs=found.macs**self.power * self.part)
