"""Which of several bundles to ship on this machine: simple rules on what was measured; docs/calibration.md has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FASTER", "FEWEST_RUNS", "MOST_LOST", "Advice", "Candidate", "Loss", "advise"]

MOST_LOST = 0.5
"""Points of accuracy (of images that change class, without labels) that a bundle may lose."""
FASTER = 0.05
"""Share of the time by which a bundle has to be faster, for it to matter."""
FEWEST_RUNS = 10
"""Fewer runs do not tell speeds apart."""


@dataclass(frozen=True)
class Loss:
    """What a bundle loses against the first on the same images.

    Attributes:
        lost: images that the first alone got right; without labels, that change class.
        gained: images that the other alone got right; 0 without labels.
        images: how many.
        labelled: whether it is accuracy.
    """

    lost: float
    gained: float
    images: float
    labelled: bool = True

    @property
    def points(self) -> float:
        """Points of accuracy, negative where it gains; without labels, of images that change class."""
        return 100 * (self.lost - self.gained) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Where the points lie for sure, two standard errors to either side, paired by image.

        The intervals of Agresti and Min (2005) and, without labels, of Agresti and Coull (1998). They add images of
        either kind, so that a few images without any difference do not pass for certainty.
        """
        if self.labelled:
            total = self.images + 2
            centre = (self.lost - self.gained) / total
            error = math.sqrt(self.lost + self.gained + 1 - (self.lost - self.gained) ** 2 / total) / total
        else:
            total = self.images + 4
            centre = (self.lost + 2) / total
            error = math.sqrt(centre * (1 - centre) / total)
        return 100 * (centre - 2 * error), 100 * (centre + 2 * error)

    @property
    def acceptable(self) -> bool:
        """Whether the images show that no more than MOST_LOST is lost."""
        return self.interval[1] <= MOST_LOST

    @property
    def excessive(self) -> bool:
        """Whether the images show that more than MOST_LOST is lost."""
        return self.interval[0] > MOST_LOST

    @property
    def wanted_images(self) -> int | None:
        """About as many images would show an acceptable loss, if as large a part changed; None where they would not."""
        if self.points >= MOST_LOST:
            return None
        times = 1.0
        while not self._times(times).acceptable:
            times *= 1.05
        wanted = times * self.images
        digit: int = 10 ** math.floor(math.log10(wanted))
        return math.ceil(wanted / digit) * digit

    def _times(self, times: float) -> Loss:
        """The same of so many times the images."""
        return Loss(times * self.lost, times * self.gained, times * self.images, self.labelled)

    def __str__(self) -> str:
        if not self.labelled:
            return f"{self.points:.2f} % of {self.images} images change class"
        low, high = self.interval
        noise = ", within noise" if low <= 0 <= high else ""
        return f"accuracy changes by {0.0 - self.points:+.2f} points ({-high:+.2f} to {-low:+.2f}{noise})"


@dataclass(frozen=True)
class Candidate:
    """A bundle that was measured.

    Attributes:
        name: of the bundle.
        precision: of its graphs.
        backend: what ran it.
        on_cpu: whether that was on the CPU.
        ms: an image took, by the median.
        bytes: of its weights and graphs.
        loss: against the first bundle; None of the first.
        turns: milliseconds of every run, in turns with the others'; none where they are not known.
    """

    name: str
    precision: str
    backend: str
    on_cpu: bool
    ms: float
    bytes: int
    loss: Loss | None = None
    turns: tuple[float, ...] = ()


@dataclass(frozen=True)
class Advice:
    """What to ship here, None where that cannot be told, and why, in sentences."""

    ship: str | None
    lines: tuple[str, ...]


def advise(candidates: Sequence[Candidate], runs: int) -> Advice:
    """The fastest of the bundles that are shown to lose no more than MOST_LOST against the first.

    Args:
        candidates: what was measured, the first of them the reference, such as fp32.
        runs: measured of each.
    """
    first, *others = candidates
    if runs < FEWEST_RUNS:
        return Advice(None, (f"none: {runs} runs are too few to compare speeds; measure {FEWEST_RUNS} or more",))
    able = [first, *(other for other in others if other.loss and other.loss.acceptable)]
    quickest = min(able, key=lambda one: one.ms)
    faster = [one for one in able if _faster(one, first) and not _faster(quickest, one)]
    best = min(faster, key=lambda one: one.bytes) if _faster(quickest, first) else first
    lines = [_reason(best, first, others)]
    lines += [_verdict(other, best, first) for other in others if other is not best]
    if unseen := {other.backend for other in others} - {one.backend for one in candidates if _alike(one, first)}:
        lines.append(f"{first.name} did not run in {', '.join(sorted(unseen))}: name it twice to compare it there too.")
    return Advice(best.name, tuple(lines))


def _alike(one: Candidate, first: Candidate) -> bool:
    return one.precision == first.precision


def _faster(one: Candidate, other: Candidate) -> bool:
    """Whether a bundle is faster by FASTER, and was in more of the turns than chance explains (two standard errors)."""
    if one.ms >= (1 - FASTER) * other.ms:
        return False
    pairs = list(zip(one.turns, other.turns, strict=True))
    won = sum(mine < theirs for mine, theirs in pairs)
    return won >= len(pairs) / 2 + math.sqrt(len(pairs))


def _reason(best: Candidate, first: Candidate, others: Sequence[Candidate]) -> str:
    if best is not first:
        return f"ship {best.name} here: it takes {_size(best, first)}; {best.loss}."
    if any(_faster(other, first) for other in others):
        return f"ship {first.name} here: nothing faster is shown to lose {MOST_LOST} points at most."
    return f"ship {first.name} here: nothing else is more than {FASTER:.0%} faster."


def _size(one: Candidate, first: Candidate) -> str:
    return f"{one.ms / first.ms:.2f} of {first.name}'s time and {one.bytes / first.bytes:.2f} of its bytes"


def _verdict(one: Candidate, best: Candidate, first: Candidate) -> str:
    """Why a bundle is not the one to ship, or what would tell whether it may be."""
    loss = one.loss
    assert loss is not None  # it is not the first
    why = []
    if _faster(first, one):
        why.append("slower")
    elif not _faster(one, first):
        why.append("not faster")
    if loss.excessive:
        why.append(f"loses more than {MOST_LOST} points" if loss.labelled else f"more than {MOST_LOST} %; label images")
    elif not loss.acceptable and not why:
        wanted = loss.wanted_images
        more = f"about {wanted:,} would" if wanted else "more may"
        why.append(f"{loss.images} images cannot rule out a loss of {MOST_LOST} points, {more}")
    elif not why:
        why.append(f"{best.name} is " + ("faster" if _faster(best, one) else "about as fast, and no larger"))
    return f"{one.name}: {_size(one, first)}; {loss}: {', '.join(why)}.{_known(one, first)}"


def _known(one: Candidate, first: Candidate) -> str:
    """What is known of a precision that was no faster on a CPU."""
    if not one.on_cpu or _faster(one, first):
        return ""
    known = {
        "fp16": " fp16 is for GPUs: CPUs compute it in fp32.",
        "int8": " int8 gains little on CPUs without VNNI.",
    }
    return known.get(one.precision, "")
