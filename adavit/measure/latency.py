"""From a latency to the budget that takes as long, by timing the operating points on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from adavit.bundle.operating_points import Budgets, OperatingPoint
from adavit.errors import InputError
from adavit.measure.benchmark import Images, batches
from adavit.measure.timing import time_run
from adavit.runtime.session import Runtime

__all__ = ["budget_for_latency"]

TIMED = 6
"""Operating points that are timed, of those a bundle has; between them time is taken to follow MACs."""
SECONDS = 3.0
ROUNDS = 7
"""At least so many runs of each."""

Progress = Callable[[str, float], None]


def budget_for_latency(
    runtime: Runtime, budgets: Budgets, images: Images, batch: int, milliseconds: float, progress: Progress
) -> float:
    """The largest budget whose runs take this long here, by the median.

    Args:
        runtime: what is to be fast enough, with its threads and what they share.
        budgets: its operating points.
        images: float32 [n, 3, S, S], to be timed on in turn.
        batch: images per run.
        milliseconds: per run.
        progress: told the stage and the share done.

    Raises:
        InputError: the operating points are all slower, or all faster.
    """
    points = _spread(budgets.points)
    taken = np.maximum.accumulate(_medians(runtime, points, images, batch, progress))  # noise is not to be believed
    if not taken[0] <= milliseconds <= taken[-1]:
        raise InputError(
            f"a latency of {milliseconds:g} ms is out of range: with batch {batch} and {runtime.options.threads} "
            f"threads, this bundle's operating points take {taken[0]:.2f} to {taken[-1]:.2f} ms on this machine"
        )
    return float(np.interp(milliseconds, taken, [point.budget for point in points]))


def _spread(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """As many of the points as are timed, the ends among them."""
    chosen = np.linspace(0, len(points) - 1, min(TIMED, len(points))).round().astype(int)
    return [points[index] for index in chosen]


def _medians(
    runtime: Runtime, points: Sequence[OperatingPoint], images: Images, batch: int, progress: Progress
) -> npt.NDArray[np.float64]:
    """Milliseconds per run of each point, taking turns on the same images."""
    feed = batches(images, batch, None)
    rows: list[list[float]] = []
    start = time.perf_counter()
    share = 0.0
    while share < 1 or len(rows) <= ROUNDS:
        chosen, _ = next(feed)
        rows.append([time_run(partial(runtime.run, chosen, budget=point.offsets)) for point in points])
        share = (time.perf_counter() - start) / SECONDS
        progress("timing operating points", min(share, 1.0))
    return np.median(rows[1:], axis=0)  # the first is the warm-up
