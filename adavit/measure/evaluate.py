"""The work of `adavit-run`: images through a bundle, predictions, accuracy, and the measurement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.demo import demo_bundle, names_demo
from adavit.bundle.operating_points import present
from adavit.bundle.policy import Policy
from adavit.cpus import usable_cpus
from adavit.datasets.image_files import ImageFile, find_images, labels_by
from adavit.drawing import Sample
from adavit.errors import InputError, OptionError
from adavit.measure.benchmark import Images, Plan, Progress, measure, summarise
from adavit.measure.latency import budget_for_latency
from adavit.measure.shown import spread_over_classes
from adavit.measure.waterfall import profile
from adavit.results import Result
from adavit.runtime.backend import Options
from adavit.runtime.session import Runtime, load

__all__ = ["RunOptions", "run_bundle"]

SHOWN = 20
"""Images whose predictions are listed."""
HELD = 256 << 20
"""Bytes of preprocessed images kept for the measurement."""
RANDOM_IMAGES = 8
PREPARING_IMAGES = 64
"""Images whose use is prepared for; further random ones where the input is random."""
LOADING = (
    "backend",
    "threads",
    "provider",
    "parallel",
    "budget",
    "cuda_graphs",
    "trust_engines",
    "precision",
    "shared_pool",
)
"""Options that `adavit.load` takes too."""
TIMED_IMAGES = 64
"""Images that operating points are timed on, to find the one for a latency."""


@dataclass(frozen=True)
class RunOptions:
    """What `adavit-run` is asked for; see `adavit-run --help`."""

    images: tuple[Path, ...] = ()
    batch: int = 1
    iterations: int | None = None
    seconds: float | None = None
    warmup: int = 3
    threads: int | None = None
    backend: str = "onnxruntime"
    provider: str | None = None
    parallel: str = "auto"
    cuda_graphs: bool = False
    trust_engines: bool = False
    record_policy: Path | None = None
    replay_policy: Path | None = None
    draw: Path | None = None
    budget: float | None = None
    latency_ms: float | None = None
    dense: bool | None = None
    top: int = 1
    profile: str | None = None
    specialise: bool = True
    labels_by_order: bool = False
    precision: str | None = None
    shared_pool: bool = False

    def with_used_threads(self, notes: list[str]) -> RunOptions:
        """Fewer threads where a batch uses fewer, since samples run in parallel: the twin has no more then.

        What changes is added to the notes.
        """
        threads = self.threads or usable_cpus()
        options = Options(threads, parallel=self.parallel)
        used = options.workers(self.batch) * options.threads_of(self.batch)
        if used == threads:
            return self
        notes.append(
            f"samples run in parallel, each on one thread: a batch of {self.batch} uses {used} of {threads} "
            "threads, and so does the dense twin here; give a larger `batch`, or `parallel='operators'`"
        )
        return replace(self, threads=used)

    def load(self, bundle: Path, **how: Any) -> Runtime:
        """Loads a bundle to be run so; what is prepared, is prepared before the measurement.

        Args:
            bundle: the folder.
            how: arguments of `adavit.load` that are other than these options.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in LOADING}
        return load(bundle, specialise=False, **(values | how))


@dataclass
class Evaluation:
    """What one pass over the images gathers."""

    images: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list)
    shown_labels: list[int | None] = field(default_factory=list)
    by_class: Counter[int | None] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    macs: list[npt.NDArray[np.int64]] = field(default_factory=list)
    policies: list[Policy] = field(default_factory=list)
    held: list[Images] = field(default_factory=list)
    held_at: list[int] = field(default_factory=list)
    drawn: Sample = field(default_factory=Sample)

    def accuracy(self, classes: int) -> dict[str, float | None] | None:
        """Top-1 and top-5 shares, where images had labels; no top-5 of so few classes that it is always right."""
        if not self.labelled:
            return None
        top5 = self.top5 / self.labelled if classes > 5 else None
        return {"top1": self.top1 / self.labelled, "top5": top5, "n": self.labelled}

    def may_show(self, label: int | None) -> bool:
        """Whether an image of this class may be listed, of which some are kept until all classes are known."""
        self.by_class[label] += 1
        return self.by_class[label] <= (SHOWN if len(self.by_class) < SHOWN else 1)

    def predictions(self) -> list[dict[str, Any]]:
        """Those to be listed, evenly of all classes."""
        return [self.shown[position] for position in spread_over_classes(self.shown_labels, SHOWN)]


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
    seen = _evaluate(runtime, files, options, replayed, progress)
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
    batches = [pixels for _, pixels in _readable(runtime, some, len(some), Evaluation())]
    images = batches[0] if batches else _random_images(runtime)
    budget = budget_for_latency(runtime, budgets, images, options.batch, milliseconds, progress)
    runtime.offsets = budgets.offsets(budget)
    return budget


def _evaluate(
    runtime: Runtime, files: list[ImageFile], options: RunOptions, replayed: Policy | None, progress: Progress
) -> Evaluation:
    """Runs every readable image once; raises InputError where there are images and none is readable."""
    seen = Evaluation()
    room = max(1, HELD // (4 * 3 * runtime.architecture.image_size**2))
    stride = math.ceil(len(files) / room)
    for done, (batch, pixels) in enumerate(_readable(runtime, files, options.batch, seen), 1):
        policy = None
        if replayed is not None:
            if len(replayed) < seen.images + len(batch):
                raise InputError(f"{options.replay_policy}: holds {len(replayed)} images, fewer than are to be run")
            policy = replayed[seen.images : seen.images + len(batch)]
        result = runtime.run(pixels, policy=policy)
        for row in range(-seen.images % stride, len(batch), stride):
            seen.held.append(pixels[row : row + 1].copy())  # not the batch
            seen.held_at.append(seen.images + row)
        if options.draw:
            seen.drawn.add(pixels, result)
        _gather(runtime, seen, batch, result, options.top)
        progress("running images", min(1.0, done * options.batch / len(files)))
    if files and not seen.images:
        raise InputError(f"none of the {len(seen.skipped)} images can be read; first: {seen.skipped[0]}")
    return seen


def _readable(
    runtime: Runtime, files: list[ImageFile], batch: int, seen: Evaluation
) -> Iterator[tuple[list[ImageFile], npt.NDArray[np.float32]]]:
    """Batches of files and their pixels, [n, 3, S, S]; unreadable ones are noted and left out."""
    chosen: list[ImageFile] = []
    pixels: list[npt.NDArray[np.float32]] = []
    for position, file in enumerate(files):
        try:
            pixels.append(runtime.preprocess(file.path))
            chosen.append(file)
        except InputError as error:
            seen.skipped.append(str(error))
        if chosen and (len(chosen) == batch or position == len(files) - 1):
            yield chosen, np.stack(pixels)
            chosen, pixels = [], []


def _gather(runtime: Runtime, seen: Evaluation, batch: list[ImageFile], result: Result, top: int) -> None:
    seen.policies.append(result.policy)
    seen.macs.append(result.macs)
    for row, file in enumerate(batch):
        seen.images += 1
        found = runtime.prediction(result, row, max(5, top))
        if file.label is not None:
            seen.labelled += 1
            seen.top1 += file.label == found.classes[0]
            seen.top5 += file.label in found.classes[:5]
        if seen.may_show(file.label):
            seen.shown_labels.append(file.label)
            seen.shown.append(
                {
                    "image": str(Path(*file.path.parts[-2:])),
                    "top": [[label, share] for label, share in found.top[:top]],
                    "label": None if file.label is None else runtime.labels[file.label],
                    "macs": found.macs,
                    "usage": found.usage,
                }
            )


def _random_images(runtime: Runtime, count: int = RANDOM_IMAGES) -> Images:
    """Standard normal input: what normalised photographs look like to first order; others for another count."""
    side = runtime.architecture.image_size
    return np.random.default_rng(count).standard_normal((count, 3, side, side), dtype=np.float32)
