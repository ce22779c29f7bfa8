"""Timing runs that are compared: in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from statistics import median
from time import perf_counter
from typing import TypeVar

__all__ = ["median_times", "time_run"]

Key = TypeVar("Key", bound=Hashable)


def time_run(run: Callable[[], object]) -> float:
    """What a run takes."""
    start = perf_counter()
    run()
    return (perf_counter() - start) * 1e3


def median_times(
    runs: Mapping[Key, Callable[[], object]], rounds: int, stage: str, progress: Callable[[str, float], None]
) -> dict[Key, float]:
    """Median milliseconds of runs that take turns, after one round that is not counted."""
    times: dict[Key, list[float]] = {key: [] for key in runs}
    for done in range(rounds + 1):
        for key, run in runs.items():
            times[key].append(time_run(run))
        progress(stage, (done + 1) / (rounds + 1))
    return {key: median(taken[1:]) for key, taken in times.items()}
