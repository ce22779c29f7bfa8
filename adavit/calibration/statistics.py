"""Runs calibration images at every operating point of a bundle, and writes what the policies kept into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adavit.bundle.bundle import Bundle, write_config
from adavit.bundle.statistics import operating_offsets, write_statistics
from adavit.runtime.session import Runtime

__all__ = ["IMAGES", "add_statistics"]

IMAGES = 256
"""Images that run at most: more change next to nothing in what a runtime prepares."""
BATCH = 16

Progress = Callable[[str, float], None]


def add_statistics(folder: Path, runtime: Runtime, images: npt.NDArray[np.float32], progress: Progress) -> None:
    """Writes `statistics.npz` into the bundle `folder`, in the place of what it had.

    Args:
        folder: the bundle.
        runtime: runs it.
        images: normalised pixels [n, 3, S, S].
        progress: told the stage and the share done.
    """
    bundle, policies = Bundle.open(folder), []
    points, images = operating_offsets(bundle), images[:IMAGES]
    starts = range(0, len(images), BATCH)
    for done, offsets in enumerate(points):
        parts = []
        for start in starts:
            parts.append(runtime.run(images[start : start + BATCH], budget=offsets).policy)
            progress("recording policies", (done + min(1.0, (start + BATCH) / len(images))) / len(points))
        policies.append(type(parts[0]).concatenate(parts))
    stored = write_statistics(folder, policies)
    added = {"statistics": vars(stored), "capacity_quantile": bundle.capacity_quantile}
    write_config(folder, {**bundle.config, **added})
