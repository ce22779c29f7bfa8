"""Where a runtime's time goes, from the ideal (executed MACs at the dense twin's speed) to what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from threading import get_ident
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np

from adavit.architecture import Architecture
from adavit.bundle.policy import Policy
from adavit.macs import batch_macs, block_macs, dense_macs, outside_macs
from adavit.measure.benchmark import Images, Plan, Progress, batches, repeat
from adavit.measure.breakdown import BETWEEN, IDLE, Breakdown
from adavit.measure.profile import FETCH, GRAPH, Event, ProfiledBackend, block_part
from adavit.measure.profile_batches import ProfiledBatches
from adavit.measure.trace import write_trace
from adavit.runtime.batch import EXACT
from adavit.runtime.session import Runtime

__all__ = ["profile"]

TRACED = 10
"""Runs in a trace."""
DISTURBED = 2.0
"""Runs that take this many times the median were disturbed by something else, and are left out."""


class Turn(NamedTuple):
    """A run, the calls it was made of, what its images used, and the dense twin's run on the same images."""

    run: Event
    calls: list[Event]
    policy: Policy
    dense: Event


def profile(
    runtime: Runtime,
    images: Images,
    plan: Plan,
    policy: Policy | None = None,
    trace: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times every call of the backend, alternating with the dense twin.

    Args:
        runtime: what to profile; a second one with timers is made from it.
        images: float32 [n, 3, S, S].
        plan: batch size, length and warm-up.
        policy: replayed for the n images, instead of deciding.
        trace: where to write the first runs as a Chrome trace, or None.
        progress: told the stage and the share done.

    Returns:
        Milliseconds by part of the model, which add up to the mean latency of the runs with timers.

    Raises:
        BundleError: the bundle was exported without its dense twin, whose speed is the ideal.
        InputError: the model has no policies.
    """
    runtime.adaptive_dispatcher("profile")
    backend, how = runtime.backend, runtime.options
    timing: ProfiledBackend | ProfiledBatches
    if backend.on_host:
        timing = ProfiledBackend(runtime.architecture, backend)
    else:  # exact, since other ways have no calls to time
        timing, how = ProfiledBatches(backend), replace(how, dispatch=EXACT)
    timed = Runtime(runtime.bundle, runtime.graphs, timing, how, runtime.offsets, specialise=False)
    timed.run_dense(images[: plan.batch])
    feed = batches(images, plan.batch, policy)
    warmup = max(plan.warmup, -(-len(images) // plan.batch))  # every set of heads is bound by then
    for done in range(warmup):
        if progress:
            progress("warming up", done / warmup)
        chosen, recorded = next(feed)
        timed.run(chosen, policy=recorded)
    turns: list[Turn] = []
    for _ in repeat(plan, len(images), "profiling", progress):
        chosen, recorded = next(feed)
        with timing.recording() as calls:
            start = perf_counter_ns()
            result = timed.run(chosen, policy=recorded)
            run = _span("run", start)
        start = perf_counter_ns()
        timed.run_dense(chosen)
        turns.append(Turn(run, calls, result.policy, _span("dense twin", start)))
    if trace:
        spans = [span for turn in turns[:TRACED] for span in (turn.run, turn.dense, *turn.calls)]
        write_trace(trace, f"{runtime.bundle.name} on {runtime.backend.name}", spans)
    return _report(timed, plan, turns, timing.cost())


def _span(name: str, start: int) -> Event:
    return Event(name, start, perf_counter_ns(), get_ident())


def asked_macs(arch: Architecture, policy: Policy) -> dict[str, int]:
    """MACs that a policy asks for, by part of the model."""
    counts = policy.tokens.sum(-1), policy.heads.sum(-1)
    runs = policy.sublayers.astype(np.int64)
    blocks = block_macs(arch, *counts, runs[..., 0], runs[..., 1]).sum(0).tolist()
    head = arch.width * arch.classes
    blocks[-1] += len(policy) * head  # its graph classifies
    stem = len(policy) * (outside_macs(arch) - head)
    return {"stem": stem, **{block_part(index): macs for index, macs in enumerate(blocks)}}


def padding_macs(arch: Architecture, calls: Sequence[Event], policy: Policy) -> Counter[str]:
    """MACs that blocks compute beyond those that are asked for, by part of the model.

    They are of further tokens and, in a batch, of dropped heads, and of images that run again.
    """
    found: Counter[str] = Counter()
    in_batches = {event.part for event in calls if event.room is not None}
    for event in calls:
        if event.room is not None:
            found[event.part] += batch_macs(arch, *event.room, heads=event.heads)
        else:
            found[event.part] += _padding_of_one(arch, event)
    if in_batches:
        asked = asked_macs(arch, policy)
        asked[block_part(arch.depth - 1)] -= len(policy) * arch.width * arch.classes
        for part in in_batches:
            found[part] -= asked[part]
    return found


def _padding_of_one(arch: Architecture, event: Event) -> int:
    """Of a block of one image."""
    if event.key is None:
        return 0
    _, (attention, mlp), heads = event.key
    computed, kept = (block_macs(arch, n, len(heads), attention, mlp) for n in (event.computed, event.kept))
    return computed - kept


def _report(runtime: Runtime, plan: Plan, turns: list[Turn], noted: float) -> dict[str, Any]:
    """The numbers under the key `profile` of `adavit-run --json`.

    Args:
        runtime: what was profiled.
        plan: how.
        turns: what was timed.
        noted: nanoseconds that noting a call takes.
    """
    arch, spent = runtime.architecture, Breakdown(runtime.options.workers(plan.batch))
    asked: Counter[str] = Counter()
    padding: Counter[str] = Counter()
    dense = median(milliseconds(turn.dense) for turn in turns)
    longest = DISTURBED * median(milliseconds(turn.run) for turn in turns)
    kept = [turn for turn in turns if milliseconds(turn.run) <= longest]
    for turn in kept:
        spent.add(turn.run, turn.calls)
        asked.update(asked_macs(arch, turn.policy))
        padding.update(padding_macs(arch, turn.calls, turn.policy))
    speed = dense_macs(arch) * plan.batch / dense  # MACs per millisecond

    def row(part: str) -> dict[str, Any]:
        columns = {"graphs_ms": GRAPH, "fetch_ms": FETCH, "calls_ms": BETWEEN}
        took = {name: spent.sums.get((part, kind), 0.0) / 1e6 / len(kept) for name, kind in columns.items()}
        ideal, padded = (macs / len(kept) / speed for macs in (asked[part], padding[part]))
        slower = took["graphs_ms"] - ideal - padded
        explained = {"ideal_ms": ideal, "padding_ms": padded, "slower_ms": slower}
        return {"part": part, **explained, **took, "total_ms": sum(took.values())}

    rows = [row(part) for part in [*asked, IDLE]]
    keys = [key for key in rows[0] if key != "part"]
    return {
        "runs": len(kept),
        "disturbed_runs": len(turns) - len(kept),
        "latency_ms": fmean(milliseconds(turn.run) for turn in kept),
        "timers_ms": fmean(len(turn.calls) for turn in kept) * noted / 1e6,
        "dense_ms": dense,
        "dense_gmacs_per_second": speed / 1e6,
        "parts": rows,
        "total": {key: sum(row[key] for row in rows) for key in keys},
    }


def milliseconds(event: Event) -> float:
    """How long it took."""
    return (event.end - event.start) / 1e6
