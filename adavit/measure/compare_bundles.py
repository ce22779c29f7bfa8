"""`adavit-run --compare`: bundles of one model, in each of their precisions, in size, speed, classes and decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adavit.bundle.bundle import Bundle
from adavit.bundle.policy import Policy
from adavit.datasets.image_files import ImageFile, find_images, labels_by
from adavit.errors import InputError, OptionError
from adavit.measure.advice import Candidate, Loss, advise
from adavit.measure.benchmark import Images, Plan, Progress, latency, versions
from adavit.measure.compare import BATCH, ObservedRuntime, Parity, check_same_model
from adavit.measure.compare_speed import Times, measure_in_turns
from adavit.measure.options import RunOptions
from adavit.measure.run import PREPARING_IMAGES
from adavit.runtime.session import Runtime

__all__ = ["compare_bundles", "compare_decisions", "listed"]

HELD_IMAGES = 32
"""Preprocessed images that speeds are measured on."""


@dataclass
class Comparison:
    """What one pass over the images gathers.

    Attributes:
        parities: of every bundle but the first.
        policies: of every bundle, of some of the images, to prepare for.
        held: some of the images, each [1, 3, S, S].
        skipped: why images could not be read.
    """

    parities: list[Parity]
    policies: list[list[Policy]]
    held: list[Images] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def listed(bundles: Sequence[Path], precision: str | None) -> list[tuple[Path, str]]:
    """What is to be compared: every bundle in every precision that it has, or in the one that is given.

    Raises:
        BundleError: a bundle is missing or damaged.
        InputError: a bundle is not in that precision.
        OptionError: there are fewer than two.
    """
    found: list[tuple[Path, str]] = []
    for path in bundles:
        bundle = Bundle.open(path)
        names = bundle.graphs if precision is None else [bundle.files_of(precision).precision]
        found += [(path, name) for name in names]
    if len(found) < 2:
        raise OptionError("a comparison takes two bundles or more, or one in several precisions")
    return found


def compare_bundles(bundles: Sequence[tuple[Path, str]], options: RunOptions, progress: Progress) -> dict[str, Any]:
    """Compares bundles of one model with the first of them; returns the report that `adavit-run --json` writes.

    The first runs in ONNX Runtime on the CPU, the others as asked for: a bundle compared with itself tells what a
    backend changes.

    Args:
        bundles: two or more, each in a precision; the first is the reference, such as the fp32 bundle.
        options: images, how to run, and how to measure.
        progress: told the stage and the share done.

    Raises:
        AdaViTError: a bundle, the backend or the images are not usable, or the bundles are of different models.
    """
    notes: list[str] = []
    options = options.with_used_threads(notes)
    progress("loading the bundle", 0.0)
    runtimes = _load(bundles, options)
    twins = [_twin(runtime, options.dense) for runtime in runtimes]
    files = find_images(options.images, runtimes[0].labels, options.labels_by_order, notes.append)
    seen = compare_decisions(runtimes, files, progress)
    prepared = [_prepare(*pair, options) for pair in zip(runtimes, seen.policies, strict=True)]
    plan = Plan(options.batch, options.iterations, len(runtimes) * (options.seconds or 3.0), options.warmup)
    held = np.concatenate(seen.held)[np.random.default_rng(0).permutation(len(seen.held))]
    times = measure_in_turns(runtimes, twins, held, plan, progress)
    compared = [
        {**_pair(runtimes[0], other), **parity.report()}
        for other, parity in zip(runtimes[1:], seen.parities, strict=True)
    ]
    paths = [path for path, _ in bundles]
    rows = _rows(runtimes, prepared, times, compared, plan.batch, _names(paths, runtimes))
    candidates = [_candidate(*each) for each in zip(rows, runtimes, times, [{}, *compared], strict=True)]
    runs = len(times[0].adaptive)
    return {
        "bundles": rows,
        "advice": asdict(advise(candidates, runs)),
        "batch": plan.batch,
        "threads": runtimes[0].options.threads,
        "parallel": runtimes[0].options.parallel,
        "runs": runs,
        "images_timed": len(held),
        "images": seen.parities[0].images,
        "labelled": compared[0]["labelled"],
        "labels_by": labels_by(files),
        "notes": notes,
        "skipped": seen.skipped,
        "compared": compared,
        **(compared[0] if len(compared) == 1 else {}),
    }


def compare_decisions(runtimes: Sequence[Runtime], files: Sequence[ImageFile], progress: Progress) -> Comparison:
    """Runs image files through bundles of one model, and compares all with the first.

    Raises:
        InputError: they are of different models, or none of the images can be read.
    """
    for other in runtimes[1:]:
        check_same_model(runtimes[0], other)
    first, *others = map(ObservedRuntime, runtimes)
    seen = Comparison([Parity(other) for other in others], [[] for _ in runtimes])
    done, hold, prepare = 0, _evenly_spaced(files, HELD_IMAGES), _evenly_spaced(files, PREPARING_IMAGES)
    for pixels, labels in _batches(runtimes[0].preprocess, files, seen.skipped, progress):
        reference = first.run(pixels)
        results = [reference.result, *(parity.add(pixels, labels, reference) for parity in seen.parities)]
        seen.held += [pixels[row : row + 1].copy() for row in hold(done, len(pixels))]  # not the batch
        for policies, result in zip(seen.policies, results, strict=True):
            policies += [result.policy[row : row + 1] for row in prepare(done, len(pixels))]
        done += len(pixels)
    if not done:
        raise InputError(f"none of the {len(seen.skipped)} images can be read; first: {seen.skipped[0]}")
    return seen


def _evenly_spaced(files: Sequence[ImageFile], most: int) -> Callable[[int, int], range]:
    """The rows of a batch, by where it starts and its size, that are among at most so many of all images."""
    stride = math.ceil(len(files) / most)
    return lambda start, count: range(-start % stride, count, stride)


def _batches(
    preprocess: Callable[[Path], Any], files: Sequence[ImageFile], skipped: list[str], progress: Progress
) -> Iterator[tuple[Images, list[int | None]]]:
    """Batches of pixels [n, 3, S, S] and their labels; why others cannot be read goes into `skipped`."""
    pixels: list[Any] = []
    labels: list[int | None] = []
    for done, file in enumerate(files, 1):
        try:
            pixels.append(preprocess(file.path))
            labels.append(file.label)
        except InputError as error:
            skipped.append(str(error))
        if pixels and (len(pixels) == BATCH or done == len(files)):
            yield np.stack(pixels), labels
            pixels, labels = [], []
        progress("comparing", done / len(files))


def _load(bundles: Sequence[tuple[Path, str]], options: RunOptions) -> list[Runtime]:
    (path, precision), *others = bundles
    reference = {"backend": "onnxruntime", "provider": None, "dispatch": "auto", "trust_engines": False}
    first = options.load(path, precision=precision, **reference)
    runtimes = [first]
    for path, precision in others:
        runtimes.append(options.load(path, precision=precision))
        check_same_model(first, runtimes[-1])
    return runtimes


def _twin(runtime: Runtime, asked: bool | None) -> bool:
    """Whether a bundle's dense twin is measured; raises InputError where it is asked for and not there."""
    there = runtime.graphs.files.dense is not None
    if asked and not there:
        raise InputError(
            f"{runtime.bundle.path}: exported without its dense twin; export again without `with_dense=False`, "
            "or leave out `dense=True`"
        )
    return there and asked is not False


def _prepare(runtime: Runtime, policies: list[Policy], options: RunOptions) -> int:
    """Prepares for what some images used; returns how much is prepared."""
    return runtime.specialise(Policy.concatenate(policies), options.batch) if options.specialise else 0


def _pair(first: Runtime, second: Runtime) -> dict[str, Any]:
    names = [f"{one.bundle.path} ({one.graphs.precision}, {one.backend.name})" for one in (first, second)]
    return {"first": names[0], "second": names[1], "backend": second.backend.name}


def _rows(
    runtimes: Sequence[Runtime],
    prepared: Sequence[int],
    times: Sequence[Times],
    compared: Sequence[dict[str, Any]],
    batch: int,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """The table, a row for each bundle; what it has not is None."""
    rows: list[dict[str, Any]] = []
    for runtime, made, taken, name, parity in zip(runtimes, prepared, times, names, [None, *compared], strict=True):
        adaptive = latency(taken.adaptive)
        dense = latency(taken.dense) if taken.dense else None
        of_first = rows[0]["dense_latency_ms"] if rows else dense
        accuracy = (parity or compared[0])["accuracy"]
        rows.append(
            {
                "name": name,
                "path": str(runtime.bundle.path),
                "precision": runtime.graphs.precision,
                "backend": _backend(runtime),
                "bytes": runtime.graphs.files.bytes,
                "prepared": made,
                "ms_per_image": adaptive["p50"] / batch,
                "latency_ms": adaptive,
                "dense_latency_ms": dense,
                "speedup": dense["p50"] / adaptive["p50"] if dense else None,
                "speedup_over_first_dense": of_first["p50"] / adaptive["p50"] if of_first else None,
                "accuracy": accuracy["second" if parity else "first"] if accuracy else None,
                "top1_agreement": parity["free"]["top1_agreement"] if parity else None,
                "flipped": parity["free"]["flipped"] if parity else None,
                "versions": versions(runtime),
            }
        )
    return rows


def _backend(runtime: Runtime) -> str:
    """The backend, with its precision or provider where it has a choice of them."""
    found = runtime.backend.versions()
    detail = found.get("precision") or found.get("provider", "")
    return f"{runtime.backend.name} {detail}".removesuffix("CPUExecutionProvider").rstrip()


def _names(paths: Sequence[Path], runtimes: Sequence[Runtime]) -> list[str]:
    """What tells the bundles apart: their folders' names, else also precisions, backends, paths, or their places."""
    folders = [path.name or runtime.bundle.path.name for path, runtime in zip(paths, runtimes, strict=True)]
    precisions = [f"{name} {runtime.graphs.precision}" for name, runtime in zip(folders, runtimes, strict=True)]
    backends = [f"{name} in {_backend(runtime)}" for name, runtime in zip(precisions, runtimes, strict=True)]
    for names in (folders, precisions, backends, list(map(str, paths))):
        if len(set(names)) == len(names):
            return names
    named = folders if len(set(precisions)) == len(set(folders)) else precisions
    return [f"{name} ({place})" for place, name in enumerate(named, 1)]


def _candidate(row: dict[str, Any], runtime: Runtime, taken: Times, parity: dict[str, Any]) -> Candidate:
    keys = ("name", "precision", "backend", "bytes")
    loss = _loss(parity) if parity else None
    values = {key: row[key] for key in keys}
    how = {"on_cpu": runtime.backend.on_host, "ms": row["ms_per_image"], "turns": tuple(taken.adaptive)}
    return Candidate(**values, **how, loss=loss)


def _loss(parity: dict[str, Any]) -> Loss:
    if parity["labelled"]:
        return Loss(parity["lost"], parity["gained"], parity["labelled"])
    images = parity["images"]
    return Loss(images - round(images * parity["free"]["top1_agreement"]), 0, images, labelled=False)
