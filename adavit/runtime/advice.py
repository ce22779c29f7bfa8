"""Which of several bundles to ship on this machine: simple rules on what was measured; docs/calibration.md has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FASTER", "FEWEST_RUNS", "MOST_LOST", "Advice", "Candidate", "Loss", "advise"]

MOST_LOST = 0.5
"""Points of accuracy (of images that change class, without labels) that a bundle may lose."""
FASTER = 0.05
"""Share of the time by which a bundle has to be faster; less is noise."""
FEWEST_RUNS = 10
"""Fewer runs do not tell speeds apart."""


@dataclass(frozen=True)
class Loss:
    """What a bundle loses against the first on the same images.

    Attributes:
        points: of accuracy, negative where it gains; without labels, of images that change class.
        margin: two standard errors of that, paired by image.
        images: how many.
        labelled: whether it is accuracy.
    """

    points: float
    margin: float
    images: int
    labelled: bool

    @classmethod
    def of_accuracy(cls, lost: int, gained: int, images: int) -> Loss:
        """Of labelled images, some of which the first alone got right, or the other alone.

        The standard error is Agresti and Min's (2005): half an image is added to either count, so that few images
        without any difference do not pass for certainty.
        """
        changed, total = lost + gained + 1, images + 2
        variance = changed - (lost - gained) ** 2 / total
        return cls(100 * (lost - gained) / images, 200 * math.sqrt(variance) / total, images, True)

    @classmethod
    def of_classes(cls, changed: int, images: int) -> Loss:
        """Of images without labels, some of which change class; the standard error is Agresti and Coull's (1998)."""
        share, total = (changed + 2) / (images + 4), images + 4
        margin = share + 2 * math.sqrt(share * (1 - share) / total) - changed / images
        return cls(100 * changed / images, 100 * margin, images, False)

    @property
    def bearable(self) -> bool:
        """Whether the images show that no more than MOST_LOST is lost."""
        return self.points + self.margin <= MOST_LOST

    @property
    def excessive(self) -> bool:
        """Whether the images show that more than MOST_LOST is lost."""
        return self.points - self.margin > MOST_LOST

    @property
    def wanted_images(self) -> int | None:
        """About as many images would do to show a bearable loss, to one digit; None where that is not to be had."""
        if self.points >= MOST_LOST:
            return None
        wanted = self.images * (self.margin / (MOST_LOST - max(self.points, 0.0))) ** 2
        digit: int = 10 ** math.floor(math.log10(wanted))
        return math.ceil(wanted / digit) * digit

    def __str__(self) -> str:
        if not self.labelled:
            return f"{self.points:.2f} % of {self.images} images change class"
        noise = ", within noise" if abs(self.points) <= self.margin else ""
        return f"accuracy changes by {0.0 - self.points:+.2f} points (± {self.margin:.2f}{noise})"


@dataclass(frozen=True)
class Candidate:
    """A bundle that was measured.

    Attributes:
        name: of the bundle.
        precision: of its engines.
        backend: what ran it.
        on_cpu: whether that was on the CPU.
        ms: an image took, by the median.
        bytes: of its engines.
        speedup: over its own dense twin, or None.
        specialised: engines that it got for frequent sets of heads or sizes.
        loss: against the first bundle; None of the first.
    """

    name: str
    precision: str
    backend: str
    on_cpu: bool
    ms: float
    bytes: int
    speedup: float | None = None
    specialised: int = 0
    loss: Loss | None = None


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
    able = [first, *(other for other in others if other.loss and other.loss.bearable)]
    bound = min(one.ms for one in able) / (1 - FASTER)
    fastest = [one for one in able if one.ms <= bound]
    best = first if first in fastest else min(fastest, key=lambda one: one.bytes)
    lines = [_reason(best, first, others)]
    lines += [_verdict(other, best, first) for other in others if other is not best]
    lines += [note for other in others if (note := _sets(other, first))]
    if unseen := {other.backend for other in others} - {one.backend for one in candidates if _alike(one, first)}:
        lines.append(f"{first.name} did not run in {', '.join(sorted(unseen))}: name it twice to compare it there too.")
    return Advice(best.name, tuple(lines))


def _alike(one: Candidate, first: Candidate) -> bool:
    return one.precision == first.precision


def _faster(one: Candidate, other: Candidate) -> bool:
    return one.ms < (1 - FASTER) * other.ms


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
    elif not loss.bearable and not why:
        wanted = loss.wanted_images
        more = f"about {wanted:,} would" if wanted else "more may"
        why.append(f"{loss.images} images cannot rule out a loss of {MOST_LOST} points, {more}")
    elif not why:
        why.append(f"{best.name} is " + ("faster" if _faster(best, one) else "about as fast, and smaller"))
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


def _sets(one: Candidate, first: Candidate) -> str:
    """Why a bundle gains less by its policy, where it does for want of engines for frequent sets of heads."""
    if one.specialised or not first.specialised or one.precision == "fp32" or not one.speedup or not first.speedup:
        return ""
    if one.speedup >= (1 - FASTER) * first.speedup:
        return ""
    return (
        f"{one.name} has no engines for frequent sets of heads yet, so it gains less over its dense twin: "
        f"{one.speedup:.2f}x against {first.speedup:.2f}x."
    )
