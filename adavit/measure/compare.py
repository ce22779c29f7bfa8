"""Decision parity: how far a bundle's decisions and classes are another's on the same images.

A flipped decision changes what the rest of the model sees, so a second run follows the first bundle's policy: what
differs then is numeric drift alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import KINDS, Policy
from adavit.errors import InputError
from adavit.measure.agreement import Agreement
from adavit.results import Result
from adavit.runtime.dispatcher import Step
from adavit.runtime.session import Runtime

__all__ = ["BATCH", "KINDS", "ObservedRun", "ObservedRuntime", "Parity", "check_same_model"]

Float = npt.NDArray[np.float32]

EDGES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Distances of a logit from its threshold at which margins are counted."""
BATCH = 8
"""Images that are compared at once."""


def check_same_model(first: Runtime, second: Runtime) -> None:
    """Raises InputError where two bundles are not of one model."""
    if second.architecture != first.architecture or second.labels != first.labels:
        raise InputError(
            f"{first.bundle.path} and {second.bundle.path} are bundles of different models; "
            "compare bundles of one checkpoint"
        )


class ObservedRun(NamedTuple):
    """A run, and by image and block the margins of its decisions [n] of each kind."""

    result: Result
    margins: list[list[dict[str, Float]]]


class ObservedRuntime:
    """A runtime that also tells the margins of its decisions: logits less their thresholds.

    Args:
        runtime: what runs.
    """

    def __init__(self, runtime: Runtime) -> None:
        runtime.adaptive_dispatcher("compare")
        self.runtime = runtime

    def run(self, images: Float, policy: Policy | None = None, budget: Offsets | None = None) -> ObservedRun:
        """Runs images [B, 3, S, S], under a given policy, or their own at a budget."""
        arch = self.runtime.architecture
        margins: list[list[dict[str, Float]]] = [[{} for _ in range(arch.depth)] for _ in images]

        def observe(step: Step) -> None:
            if step.decisions is not None:
                margins[step.image][step.block] = margins_of(arch, step.block, step.decisions)

        return ObservedRun(self.runtime.run(images, policy, observe, budget), margins)


def margins_of(arch: Architecture, block: int, decisions: Float) -> dict[str, Float]:
    """The logits of a block's decisions [M] less the trained thresholds, by kind; the class token has none."""
    found, rest = {}, decisions
    if arch.token_policy:
        found["tokens"], rest = rest[1 : arch.tokens] - np.float32(TOKEN_LOGIT), rest[arch.tokens :]
    if arch.adapts_heads(block):
        found["heads"], rest = rest[: arch.heads].copy(), rest[arch.heads :]
    if arch.adapts_sublayers(block):
        found["sublayers"] = rest.copy()
    return found


class Parity:
    """Compares runs of two bundles on the same images, batch by batch.

    Args:
        second: what is compared with the first, the reference, whose runs `add` is given.
    """

    def __init__(self, second: ObservedRuntime) -> None:
        self.arch = second.runtime.architecture
        self._second = second
        self._free, self._replayed = Agreement(self.arch), Agreement(self.arch)
        self._margins = np.zeros((len(KINDS), len(EDGES) + 1), np.int64)
        self._flip_margin = np.zeros(len(KINDS))
        self._drift = np.zeros((len(KINDS), 2))  # sum of squares, and the largest

    def add(self, images: Float, labels: Sequence[int | None], reference: ObservedRun) -> Result:
        """Runs images [B, 3, S, S] as the second decides, and again under the policy of the first's run on them.

        Returns:
            The run as the second decides.
        """
        wanted, margins = reference
        free = self._second.runtime.run(images)
        replayed, drifted = self._second.run(images, wanted.policy)
        self._free.add(wanted, free, labels)
        self._replayed.add_logits(wanted.logits, replayed.logits, labels)
        for before, after in zip(margins, drifted, strict=True):
            for block in range(self.arch.depth):
                for kind, margin in before[block].items():
                    self._add_margins(kind, block, margin, after[block][kind])
        return free

    @property
    def images(self) -> int:
        """How many were compared."""
        return self._free.images

    def _add_margins(self, kind: str, block: int, before: Float, after: Float) -> None:
        distance, drift, row = np.abs(before), np.abs(after - before), KINDS.index(kind)
        flipped = (before > 0) != (after > 0)
        self._replayed.add_flips(kind, block, int(flipped.sum()))
        self._margins[row] += np.bincount(np.searchsorted(EDGES, distance), minlength=len(EDGES) + 1)
        self._flip_margin[row] = max(self._flip_margin[row], distance[flipped].max(initial=0))
        self._drift[row] = self._drift[row, 0] + np.square(drift).sum(), max(self._drift[row, 1], drift.max())

    def report(self) -> dict[str, Any]:
        """The numbers, under the keys of `adavit-run --compare --json`."""
        report, replayed = self._free.report(), self._replayed
        if report["accuracy"]:
            report["accuracy"]["replayed"] = replayed.right["second"] / replayed.labelled
        kinds = {}
        for row, kind in enumerate(KINDS):
            if decided := int(self._margins[row].sum()):
                below = np.cumsum(self._margins[row])[:-1] / decided
                kinds[kind] = {
                    "decisions": decided,
                    "margins_below": {str(edge): float(share) for edge, share in zip(EDGES, below, strict=True)},
                    "largest_flipped_margin": float(self._flip_margin[row]),
                    "logit_drift_rms": float(np.sqrt(self._drift[row, 0] / decided)),
                    "logit_drift_max": float(self._drift[row, 1]),
                }
        return {**report, "replayed": replayed.numbers(), "decisions": kinds}
