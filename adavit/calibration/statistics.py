"""Runs calibration images at every operating point of a bundle, and writes what the policies kept into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adavit.bundle.bundle import Bundle, write_config
from adavit.bundle.operating_points import NO_POLICIES, Offsets
from adavit.bundle.policy import Policy
from adavit.bundle.statistics import operating_offsets, write_statistics
from adavit.calibration.options import BudgetOptions
from adavit.datasets.image_files import find_calibration_images, read_images
from adavit.errors import InputError
from adavit.runtime.loading import load
from adavit.runtime.session import Runtime

__all__ = ["IMAGES", "add_statistics", "policy_of", "record_policies"]

IMAGES = 256
"""Images that run at most: more change next to nothing in what a runtime prepares."""
BATCH = 16

Progress = Callable[[str, float], None]
Told = Callable[[float], None]


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
    for done, offsets in enumerate(points):

        def told(share: float, done: int = done) -> None:
            progress("recording policies", (done + share) / len(points))

        policies.append(policy_of(runtime, images, offsets, told))
    stored = write_statistics(folder, policies)
    added = {"statistics": vars(stored), "capacity_quantile": bundle.capacity_quantile}
    write_config(folder, {**bundle.config, **added})


def policy_of(runtime: Runtime, images: npt.NDArray[np.float32], offsets: Offsets, told: Told) -> Policy:
    """What a runtime keeps of images.

    Args:
        runtime: runs them.
        images: normalised pixels [n, 3, S, S].
        offsets: the operating point.
        told: told the share done.
    """
    parts = []
    for start in range(0, len(images), BATCH):
        parts.append(runtime.run(images[start : start + BATCH], budget=offsets).policy)
        told(min(1.0, (start + BATCH) / len(images)))
    return Policy.concatenate(parts)


def record_policies(folder: Path, options: BudgetOptions, threads: int | None, progress: Progress) -> dict[str, int]:
    """Runs some of the calibration images, for the statistics of the bundle `folder`.

    Args:
        folder: the bundle.
        options: the images.
        threads: CPU threads.
        progress: told the stage and the share done.

    Returns:
        How many `images` ran, and how many could not be read, as `skipped`.

    Raises:
        InputError: the images are not usable, or the model has no policies.
        BundleError: the bundle is not usable.
    """
    options.check()
    runtime = load(folder, threads=threads, specialise=False)
    if not runtime.architecture.adapts:
        raise InputError(f"{folder}: {NO_POLICIES}")
    files = find_calibration_images(options.calibration_images, runtime.labels, options.labels_by_order)
    pixels, _ = read_images(files, runtime.preprocess, IMAGES)
    add_statistics(folder, runtime, pixels, progress)
    return {"images": len(pixels), "skipped": min(len(files), IMAGES) - len(pixels)}
