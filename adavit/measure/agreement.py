"""How far runs agree with those of a reference on the same images: in decisions, classes and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.policy import KINDS
from adavit.results import Result

__all__ = ["Agreement"]

Float = npt.NDArray[np.float32]


class Agreement:
    """Counts what differs from the reference, batch by batch.

    Args:
        arch: the model's shapes.

    Attributes:
        images: how many were compared.
        labelled: how many of them have a label.
        right: of the labelled, how many the reference and the other run get right.
    """

    def __init__(self, arch: Architecture) -> None:
        self.images = 0
        self.labelled = 0
        self.right = {"first": 0, "second": 0}
        self._lost = self._gained = self._same_policies = self._same_classes = 0
        self._logit_error = 0.0
        self._decisions = _decisions(arch)
        self._flipped = np.zeros_like(self._decisions)

    def add(self, wanted: Result, found: Result, labels: Sequence[int | None]) -> None:
        """Compares runs of the same images, each with its own decisions."""
        different = [getattr(wanted.policy, kind) != getattr(found.policy, kind) for kind in KINDS]
        self._same_policies += int((~np.concatenate([mask.any(2) for mask in different], 1).any(1)).sum())
        for row, mask in enumerate(different):
            self._flipped[row] += mask.sum((0, 2))
        self.add_logits(wanted.logits, found.logits, labels)

    def add_flips(self, kind: str, block: int, flipped: int) -> None:
        """Adds decisions that differ, where they are counted otherwise than by `add`."""
        self._flipped[KINDS.index(kind), block] += flipped

    def add_logits(self, wanted: Float, found: Float, labels: Sequence[int | None]) -> None:
        """Compares logits [B, C] of the same images."""
        self.images += len(wanted)
        classes = wanted.argmax(1), found.argmax(1)
        self._same_classes += int((classes[0] == classes[1]).sum())
        self._logit_error += float(np.abs(found - wanted).max(1).sum())
        for label, first, second in zip(labels, *classes, strict=True):
            if label is not None:
                self.labelled += 1
                right = bool(first == label), bool(second == label)
                self.right["first"] += right[0]
                self.right["second"] += right[1]
                self._lost += right[0] > right[1]
                self._gained += right[0] < right[1]

    def numbers(self) -> dict[str, Any]:
        """Shares of decisions that differ, and of images of the same class, and the mean difference of logits."""
        decided, flipped = self._decisions * self.images, self._flipped
        shares = np.divide(flipped, decided, out=np.zeros(flipped.shape), where=decided > 0)
        taken = decided.sum(1)
        return {
            "flipped": float(flipped.sum() / max(1, taken.sum())),
            "flipped_by_kind": {
                kind: float(flipped[row].sum() / taken[row]) for row, kind in enumerate(KINDS) if taken[row]
            },
            "flipped_by_block": {kind: shares[row].tolist() for row, kind in enumerate(KINDS) if taken[row]},
            "top1_agreement": self._same_classes / self.images,
            "mean_logit_difference": self._logit_error / self.images,
        }

    def report(self) -> dict[str, Any]:
        """The numbers of runs with their own decisions, under the keys of `adavit-run --compare --json`."""
        labelled = self.labelled
        return {
            "images": self.images,
            "free": self.numbers() | {"identical_policies": self._same_policies / self.images},
            "accuracy": {name: count / labelled for name, count in self.right.items()} if labelled else None,
            "labelled": labelled,
            "lost": self._lost if labelled else None,
            "gained": self._gained if labelled else None,
        }


def _decisions(arch: Architecture) -> npt.NDArray[np.int64]:
    """How many decisions of each kind the blocks take for an image: [3, L]."""
    tokens, heads, sublayers = arch.patches * arch.token_policy, arch.heads, 2
    rows = [(tokens, heads * arch.adapts_heads(b), sublayers * arch.adapts_sublayers(b)) for b in range(arch.depth)]
    return np.array(rows, np.int64).T
