"""The work of `adavit-run`: images through a bundle, predictions, accuracy, and the measurement."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from adavit.bundle.demo import demo_bundle, names_demo
from adavit.bundle.operating_points import present
from adavit.bundle.policy import Policy
from adavit.datasets.image_files import ImageFile, find_images, labels_by
from adavit.errors import InputError, OptionError
from adavit.measure.benchmark import Images, Plan, Progress, measure, summarise
from adavit.measure.evaluation import Evaluation, evaluate, readable
from adavit.measure.latency import budget_for_latency
from adavit.measure.options import RunOptions
from adavit.measure.waterfall import profile
from adavit.runtime.batch_dispatcher import BatchDispatcher
from adavit.runtime.session import Runtime
from adavit.runtime.ways import without_capacity

__all__ = ["run_bundle"]

RANDOM_IMAGES = 8
PREPARING_IMAGES = 64
"""Images whose use is prepared for; further random ones where the input is random."""
TIMED_IMAGES = 64
"""Images that operating points are timed on, to find the one for a latency."""


def run_bundle(path: Path | None, options: RunOptions, progress: Progress) -> dict[str, Any]:
    """Runs and measures a bundle; returns the report that `adavit-run --json` writes.

    Raises:
        AdaViTError: the bundle, the backend or the images are not usable.
    """
    folder, demo = path or demo_bundle(), path is None or names_demo(path)
    given = options.images or ((demo_bundle().parent / "images",) if demo else ())
    if options.draw and not given:
        raise OptionError("`draw` draws images, and random input has none; give `images` too")
    notes: list[str] = []
    options = options.with_used_threads(notes)
    progress("loading the bundle", 0.0)
    runtime = options.load(folder)
    if isinstance(runtime.dispatcher, BatchDispatcher):
        notes += filter(None, [without_capacity(runtime.bundle, runtime.options)])
    profiles = options.profile is not None
    if options.dense or profiles:
        runtime.adaptive_dispatcher("profile" if profiles else "compare with a dense twin")
        if not has_twin(runtime):
            without = "`profile`" if profiles else "`dense=True`"
            raise InputError(
                f"{folder}: exported without its dense twin; export again without `with_dense=False`, "
                f"or leave out {without}"
            )
    replayed = Policy.load(options.replay_policy) if options.replay_policy else None
    files = find_images(given, runtime.labels, options.labels_by_order, notes.append)
    budget = options.budget
    if options.latency_ms is not None:
        budget = _meet_latency(runtime, files, options, options.latency_ms, progress)
    seen = evaluate(runtime, files, options, replayed, progress)
    if not given:
        images = _random_images(runtime)
        result = runtime.run(images, policy=replayed)
        seen = Evaluation(len(images), macs=[result.macs], policies=[result.policy])
        seen.held, seen.held_at = list(images[:, None]), list(range(len(images)))
    used = Policy.concatenate(seen.policies)
    prepared = 0
    if options.specialise and runtime.architecture.adapts:
        progress("preparing", 0.0)
        prepared = _prepare(runtime, used if given or replayed else None, options.batch)
    if options.record_policy:
        used.save(options.record_policy)
    if options.draw:
        seen.drawn.save(options.draw, runtime.labels)
    plan = Plan(
        options.batch,
        options.iterations,
        options.seconds or 3.0,
        options.warmup,
        has_twin(runtime) if options.dense is None else options.dense,
    )
    # Shuffled, since labelled sets come sorted by class, and a measurement may not reach the last image.
    order = np.random.default_rng(0).permutation(len(seen.held))
    policy = used[np.asarray(seen.held_at)[order]] if replayed else None
    held = np.concatenate(seen.held)[order]
    measured = measure(runtime, held, plan, policy, progress)
    trace = Path(options.profile) if options.profile else None
    return {
        **summarise(runtime, plan, measured, float(np.concatenate(seen.macs).mean()), used.usage()),
        "choice": {**asdict(runtime.choice), "reason": str(runtime.choice)} if runtime.choice else None,
        "prepared": prepared,
        "budget": None if budget is None else {"macs": budget, "offsets": asdict(runtime.offsets)},
        "images": seen.images,
        "input": "images" if given else "random",
        "accuracy": seen.accuracy(len(runtime.labels)),
        "labels_by": labels_by(files),
        "notes": notes,
        "predictions": seen.predictions(),
        "skipped": seen.skipped,
        "drawn": None if options.draw is None else str(options.draw),
        "profile": profile(runtime, held, plan, policy, trace, progress) if profiles else None,
    }


def has_twin(runtime: Runtime) -> bool:
    """Whether there is a dense twin to compare with; a model without policies is its own."""
    return runtime.architecture.adapts and runtime.graphs.files.dense is not None


def _prepare(runtime: Runtime, used: Policy | None, batch: int) -> int:
    """Prepares for what some images used, by default further random ones; returns how much is prepared."""
    if used is not None:
        used = used[:: math.ceil(len(used) / PREPARING_IMAGES)]
    else:
        images = _random_images(runtime, PREPARING_IMAGES)
        starts = range(0, PREPARING_IMAGES, batch)
        used = Policy.concatenate([runtime.run(images[start : start + batch]).policy for start in starts])
    return runtime.specialise(used, batch)


def _meet_latency(
    runtime: Runtime, files: list[ImageFile], options: RunOptions, milliseconds: float, progress: Progress
) -> float:
    """Sets the runtime to the operating point that takes so long on some of the images, and returns its budget."""
    budgets = present(runtime.bundle)
    some = files[:: max(1, len(files) // TIMED_IMAGES)]
    batches = [pixels for _, pixels in readable(runtime, some, len(some), Evaluation())]
    images = batches[0] if batches else _random_images(runtime)
    budget = budget_for_latency(runtime, budgets, images, options.batch, milliseconds, progress)
    runtime.offsets = budgets.offsets(budget)
    return budget


def _random_images(runtime: Runtime, count: int = RANDOM_IMAGES) -> Images:
    """Standard normal input: what normalised photographs look like to first order; others for another count."""
    side = runtime.architecture.image_size
    return np.random.default_rng(count).standard_normal((count, 3, side, side), dtype=np.float32)
