"""How much room the blocks of a batch get before anyone knows what its images keep."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.bundle import Bundle
from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import Policy
from adavit.bundle.statistics import policies_around
from adavit.runtime.batch import Room

__all__ = ["CapacityTable", "capacity_table"]

Int = npt.NDArray[np.int64]

SAMPLES, BATCHES = 64, 128
"""Sets of images that are drawn, and batches that are drawn from each."""
RECENT = 64
"""Batches of a size that are remembered."""
OFTEN, LEAST = 0.03, 3
"""Share of these that may overflow, and the number that must have before the table grows."""


class CapacityTable:
    """The room that each block gets, by batch size; any thread may use it.

    Random batches of calibration images say what is needed. Four sizes a block are chosen, all at one quantile of
    their own, so that a share of the batches fits in every block. Calibration images are few, which counts twice: the
    batches are drawn from random samples of them, and among them is one more image that keeps everything.

    Args:
        arch: the model's shapes.
        policies: what calibration images keep, at one operating point or more; the table has room for each.
        quantile: share of the batches that fit.
    """

    def __init__(self, arch: Architecture, policies: Sequence[Policy], quantile: float) -> None:
        self._arch, self._quantile = arch, quantile
        everything = Policy.dense(arch, 1)
        self._images = [_rows(Policy.concatenate([policy, everything])) for policy in policies]
        self._lock = threading.Lock()
        self._sizes: dict[int, Int] = {}
        self._versions: dict[int, int] = {}
        self._recent: dict[int, deque[Int | None]] = {}

    def rooms(self, batch: int) -> list[Room]:
        """The room that each block gets for a batch of so many images."""
        with self._lock:
            return [Room.of(sizes) for sizes in self._of(batch)]

    def version(self, batch: int) -> int:
        """How often the room for a batch of so many images has grown."""
        with self._lock:
            return self._versions.get(batch, 0)

    def note(self, batch: int, needed: Int | None) -> None:
        """Remembers how a batch went. Where they clearly overflow too often, the table grows to their needs.

        Args:
            batch: its number of images.
            needed: T, A, K and U of each block, [L, 4], where it overflowed; None where it fitted.
        """
        with self._lock:
            recent = self._recent.setdefault(batch, deque(maxlen=RECENT))
            recent.append(needed)
            beyond = [sizes for sizes in recent if sizes is not None]
            expected = OFTEN * len(recent)
            if len(beyond) < LEAST or len(beyond) <= expected + 2 * expected**0.5:  # two standard deviations: no chance
                return
            grown = np.minimum(np.max([self._of(batch), *beyond], 0), self._most(batch))
            recent.clear()
            if (grown > self._of(batch)).any():
                self._sizes[batch] = grown
                self._versions[batch] = self._versions.get(batch, 0) + 1

    def _of(self, batch: int) -> Int:
        """The sizes [L, 4]."""
        if batch not in self._sizes:
            found = [_fitting(_needs(rows, batch), self._quantile) for rows in self._images]
            self._sizes[batch] = np.max(found, 0)
        return self._sizes[batch]

    def _most(self, batch: int) -> Int:
        """What a batch can need at all, [4]."""
        tokens = self._arch.tokens
        return np.array([batch * tokens, batch, tokens, batch * tokens])


def capacity_table(bundle: Bundle, offsets: Offsets) -> CapacityTable | None:
    """The table for some offsets: for a budget between two stored points it has room for both.

    Returns:
        None where the bundle has no statistics: an export with calibration images makes them.

    Raises:
        BundleError: the statistics are damaged, or of another model.
    """
    policies = policies_around(bundle, offsets)
    return CapacityTable(bundle.architecture, policies, bundle.capacity_quantile) if policies else None


def _rows(policy: Policy) -> Int:
    """The rows that each image has in attention and in the MLP, [n, L, 2]."""
    return np.asarray(policy.tokens.sum(2)[:, :, None] * policy.sublayers, np.int64)


def _needs(rows: Int, batch: int) -> Int:
    """T, A, K and U of each block, of random batches: [n, L, 4]."""
    source, images, found = np.random.default_rng(batch), len(rows), []
    for _ in range(SAMPLES):
        sample = rows[source.integers(images, size=images)]
        drawn = sample[source.integers(images, size=(BATCHES, batch))]  # [n, B, L, 2]
        attention, mlp = drawn[..., 0], drawn[..., 1]
        sizes = attention.sum(1), (attention > 0).sum(1), attention.max(1), mlp.sum(1)
        found.append(np.stack(sizes, -1))
    return np.concatenate(found)


def _fitting(needs: Int, quantile: float) -> Int:
    """The sizes [L, 4] that a share of the batches fits into, each with as many batches beyond it."""
    flat = needs.reshape(len(needs), -1)
    ordered = np.sort(flat, 0)
    ranks = [np.searchsorted(column, values) for column, values in zip(ordered.T, flat.T, strict=True)]
    rank = int(np.quantile(np.max(ranks, 0), quantile, method="higher"))
    return np.asarray(np.maximum(1, ordered[rank]).reshape(needs.shape[1:]), np.int64)
