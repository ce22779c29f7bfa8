"""Measures a runtime against its dense twin, interleaved, and says what the policy was worth."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.policy import Policy
from adavit.macs import dense_macs
from adavit.measure.dispatch import asked_of_blocks, dispatch_report
from adavit.measure.timing import time_run
from adavit.runtime.batch_dispatcher import BatchDispatcher, Ran
from adavit.runtime.cache import cpu_name
from adavit.runtime.session import Runtime
from adavit.version import __version__

__all__ = ["Measurement", "Plan", "batches", "measure", "repeat"]

SHORT_CYCLE = 64
"""Runs after which every image has had its turn, for the last cycle of a measurement to be finished."""

Images = npt.NDArray[np.float32]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        batch: images per run.
        iterations: measured runs, or None to measure for `seconds`.
        seconds: length of the measurement where no iterations are given.
        warmup: runs before the measurement.
        dense: whether the dense twin runs too, alternating with the adaptive model on the same images.
    """

    batch: int = 1
    iterations: int | None = None
    seconds: float = 5.0
    warmup: int = 3
    dense: bool = True


@dataclass
class Measurement:
    """Latencies in milliseconds per run."""

    adaptive_ms: list[float] = field(default_factory=list)
    dense_ms: list[float] = field(default_factory=list)
    device_ms: dict[str, list[float]] = field(default_factory=dict)
    """Of the adaptive runs, by what took them on a device; see `BatchBackend.timings`."""
    dispatch: dict[str, Any] | None = None
    """How batches went on a device."""


def measure(
    runtime: Runtime, images: Images, plan: Plan, policy: Policy | None = None, progress: Progress | None = None
) -> Measurement:
    """Runs batches of `images` in turn, cycling, and times every run.

    Args:
        runtime: what to measure.
        images: float32 [n, 3, S, S]; fewer than a batch are repeated.
        plan: batch size, length, and whether the dense twin runs too.
        policy: replayed for the n images, instead of deciding.
        progress: told the stage and the share done, after every run.
    """
    result = Measurement()
    turns = batches(images, plan.batch, policy)
    if plan.dense:
        runtime.run_dense(images[:1])
    for done in range(plan.warmup):
        if progress:
            progress("warming up", done / plan.warmup)
        chosen, recorded = next(turns)
        runtime.run(chosen, policy=recorded)
        if plan.dense:
            runtime.run_dense(chosen)
    used: list[Policy] = []
    ran: list[Ran] = []
    on_device = runtime.dispatcher if isinstance(runtime.dispatcher, BatchDispatcher) else None
    for _ in repeat(plan, len(images), "measuring", progress):
        chosen, recorded = next(turns)
        runtime.backend.timings()
        if on_device:
            on_device.ran.clear()
        took = time_run(lambda: used.append(runtime.run(chosen, policy=recorded).policy))  # noqa: B023
        result.adaptive_ms.append(took)
        for kind, milliseconds in runtime.backend.timings().items():
            result.device_ms.setdefault(kind, []).append(milliseconds)
        if on_device:
            ran += on_device.ran
        else:
            used.clear()
        if plan.dense:
            result.dense_ms.append(time_run(lambda: runtime.run_dense(chosen)))  # noqa: B023
    if on_device:
        asked = sum(asked_of_blocks(runtime.architecture, policy) for policy in used)
        result.dispatch = dispatch_report(runtime.architecture, on_device.backend, ran, asked)
    return result


def repeat(plan: Plan, images: int, stage: str, progress: Progress | None, least: int = 1) -> Iterator[None]:
    """Once for every measured run of some number of images.

    Without a number of iterations, there are at least `least`, and the last cycle is finished where cycles are short,
    so that every image counts alike.
    """
    cycle = images // math.gcd(images, plan.batch)
    start, done, share = time.perf_counter(), 0, 0.0
    while share < 1 or (plan.iterations is None and (done < least or (cycle <= SHORT_CYCLE and done % cycle))):
        yield
        done += 1
        share = done / plan.iterations if plan.iterations else (time.perf_counter() - start) / plan.seconds
        if progress:
            progress(stage, min(share, 1.0))


def batches(images: Images, batch: int, policy: Policy | None) -> Iterator[tuple[Images, Policy | None]]:
    """Batches of images in turn, for ever, with the rows of their policy."""
    position = 0
    while True:
        index = np.arange(position, position + batch) % len(images)
        position = int(index[-1] + 1) % len(images)
        yield np.ascontiguousarray(images[index]), None if policy is None else policy[index]


def latency(milliseconds: Sequence[float]) -> dict[str, float]:
    """Percentiles and mean of latencies, in milliseconds."""
    p50, p90, p95, p99 = np.percentile(milliseconds, (50, 90, 95, 99))
    return {"p50": p50, "p90": p90, "p95": p95, "p99": p99, "mean": float(np.mean(milliseconds))}


def summarise(
    runtime: Runtime, plan: Plan, measured: Measurement, executed: float, usage: dict[str, float]
) -> dict[str, Any]:
    """The numbers of a measurement under the keys of `adavit-run --json`.

    Args:
        runtime: what was measured.
        plan: how.
        measured: the latencies.
        executed: mean MACs of the images.
        usage: mean usage of the images.
    """
    dense = dense_macs(runtime.architecture)
    adaptive = latency(measured.adaptive_ms)
    result: dict[str, Any] = {
        "model": runtime.bundle.name,
        "precision": runtime.graphs.precision,
        "backend": runtime.backend.name,
        "batch": plan.batch,
        "threads": runtime.options.threads,
        "parallel": runtime.options.parallel,
        "iterations": len(measured.adaptive_ms),
        "latency_ms": adaptive,
        "throughput": 1e3 * plan.batch / adaptive["mean"],
        "device": {kind: float(np.median(values)) for kind, values in measured.device_ms.items()} or None,
        "dispatch": measured.dispatch,
        "policies": list(runtime.architecture.policies),
        "macs": {"executed_mean": executed, "dense": dense},
        "usage": usage,
        "ideal_speedup": dense / executed,
        "dense": None,
        "speedup": None,
        "efficiency": None,
        "versions": versions(runtime),
    }
    if measured.dense_ms:
        twin = latency(measured.dense_ms)
        result["dense"] = {"latency_ms": twin, "throughput": 1e3 * plan.batch / twin["mean"]}
        result["speedup"] = twin["p50"] / adaptive["p50"]
        result["efficiency"] = result["speedup"] / result["ideal_speedup"]
    return result


def versions(runtime: Runtime) -> dict[str, str]:
    """What ran where, for reports."""
    return {
        "adavit": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        **runtime.backend.versions(),
    }
