"""Timing a run."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

__all__ = ["time_run"]


def time_run(run: Callable[[], object]) -> float:
    """Milliseconds that a run takes."""
    start = perf_counter()
    run()
    return (perf_counter() - start) * 1e3
