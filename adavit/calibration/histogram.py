"""The range of a tensor: a growing histogram of its magnitudes, and the threshold that a method takes from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Histogram"]

BINS = 2048
LEVELS = 128
"""Magnitudes that int8 tells apart."""
PERCENTILE = 99.99
STEP = BINS // LEVELS
"""Bins between the thresholds that the entropy method tries; also those of a level of the widest one."""


class Histogram:
    """Counts of magnitudes in 2048 equal bins from 0; values of exactly 0 (dropped channels) are left out.

    Attributes:
        counts: int64 [2048].
        width: of a bin; doubled, and the bins merged in pairs, when a value exceeds the last bin.
        peak: the largest magnitude.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.width = 0.0
        self.peak = 0.0

    def add(self, values: npt.NDArray[Any]) -> None:
        """Counts the magnitudes of an array of any shape."""
        magnitudes = np.abs(values[values != 0].astype(np.float64))
        if not magnitudes.size:
            return
        self.peak = max(self.peak, float(magnitudes.max()))
        if not self.width:
            self.width = self.peak / BINS
        while self.peak > self.width * BINS:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.width *= 2
        index = np.minimum((magnitudes / self.width).astype(np.int64), BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    def threshold(self, method: str) -> float:
        """The magnitude that int8's largest code stands for; what exceeds it saturates.

        Args:
            method: "max", "percentile" (99.99 % of the values lie below) or "entropy" (as TensorRT's calibrator:
                the least Kullback-Leibler divergence of the saturated distribution from its 128 levels; but what
                the widest range rounds to its first level counts as spread evenly there).
        """
        if method == "max" or not self.counts.any():
            return self.peak
        if method == "percentile":
            bins = int(np.searchsorted(np.cumsum(self.counts), self.counts.sum() * PERCENTILE / 100)) + 1
        else:
            # A GELU leaves up to half of its values next to 0. That spike would outweigh the tail, which carries the
            # signal: thresholds of a tenth of the peak, and 4 dB over the noise instead of 20.
            counts = self.counts.astype(np.float64)
            counts[:STEP] = counts[:STEP].mean()
            bins = min(range(LEVELS, BINS + 1, STEP), key=lambda bins: _divergence(counts, bins))
        return min(self.peak, bins * self.width)


def _divergence(counts: npt.NDArray[np.float64], bins: int) -> float:
    """Kullback-Leibler divergence of the first `bins` bins, the rest saturated into the last, from 128 levels."""
    saturated = counts[:bins].copy()
    saturated[-1] += counts[bins:].sum()
    level = np.arange(bins) * LEVELS // bins
    filled = saturated > 0
    mass = np.bincount(level, counts[:bins], LEVELS)
    share = np.bincount(level, filled, LEVELS)
    spread = np.divide(mass, share, out=np.zeros(LEVELS), where=share > 0)[level] * filled
    wanted, found = saturated / saturated.sum(), spread / max(spread.sum(), 1.0)
    found = np.maximum(found, 1e-12)
    return float((wanted[filled] * np.log(wanted[filled] / found[filled])).sum())
