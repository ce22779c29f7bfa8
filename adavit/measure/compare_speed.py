"""Speeds that are compared: bundles and their dense twins take turns on the same images in one measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from adavit.measure.advice import FEWEST_RUNS
from adavit.measure.benchmark import Images, Plan, Progress, batches, repeat
from adavit.measure.timing import time_run
from adavit.runtime.session import Runtime

__all__ = ["Times", "measure_in_turns"]


@dataclass
class Times:
    """Milliseconds of each run of a bundle, and of its dense twin where that was run."""

    adaptive: list[float] = field(default_factory=list)
    dense: list[float] = field(default_factory=list)


def measure_in_turns(
    runtimes: Sequence[Runtime], twins: Sequence[bool], images: Images, plan: Plan, progress: Progress
) -> list[Times]:
    """Times every bundle, and the dense twins asked for, on the same batches.

    Each batch goes through all of them before the next one comes; every second time in the reverse order.

    Args:
        runtimes: what to time.
        twins: which of them run their dense twins too.
        images: float32 [n, 3, S, S], cycled; fewer than a batch are repeated.
        plan: batch size, warm-up, and runs or seconds of each bundle.
        progress: told the stage and the share done.

    Returns:
        What the runs of each bundle took.
    """
    times = [Times() for _ in runtimes]
    turns: list[tuple[list[float], Callable[[Images], object]]] = []
    for runtime, twin, taken in zip(runtimes, twins, times, strict=True):
        turns.append((taken.adaptive, runtime.run))
        if twin:
            turns.append((taken.dense, runtime.run_dense))
            runtime.run_dense(images[:1])  # loads it
    feed = batches(images, plan.batch, None)
    for _ in range(plan.warmup):
        chosen, _ = next(feed)
        for _, run in turns:
            run(chosen)
    for _ in repeat(plan, len(images), "measuring", progress, FEWEST_RUNS):
        chosen, _ = next(feed)
        for taken_ms, run in turns:
            taken_ms.append(time_run(partial(run, chosen)))
        turns.reverse()
    return times
