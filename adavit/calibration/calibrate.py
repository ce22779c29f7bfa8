"""From an fp32 bundle and images to a bundle of another precision."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adavit.calibration.cache import Origin, load_ranges, save_ranges
from adavit.calibration.check import check_converted
from adavit.calibration.convert import Assignment, assign, converted, engine_precision
from adavit.calibration.mixed import Measure, Search, read_images
from adavit.calibration.ranges import Ranges, measure_ranges
from adavit.calibration.recording import Recorder
from adavit.errors import InputError
from adavit.export.write import write_bundle
from adavit.precision_options import CalibrationOptions
from adavit.reading import open_regular
from adavit.bundle.bundle import Bundle
from adavit.runtime.image_files import ImageFile, find_calibration_images, labels_by
from adavit.runtime.session import Runtime, load

__all__ = ["calibrate_bundle"]

MIN_IMAGES = 16
"""Fewer tell too little about the ranges of any engine."""

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]


def calibrate_bundle(
    source: Path,
    folder: Path,
    options: CalibrationOptions,
    cache: Path,
    threads: int | None,
    progress: Progress,
    check: bool = True,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Writes the fp32 bundle `source` in the precision asked for into the empty `folder`.

    Args:
        source: the fp32 bundle.
        folder: where to write.
        options: precision and what to calibrate on.
        cache: ranges to reuse or to write, where the options name no file.
        threads: CPU threads.
        progress: told the stage and the share done.
        check: whether to run the result beside the fp32 bundle.

    Returns:
        `config.json`'s content, the report of the calibration, and that of the check, if any.

    Raises:
        InputError: the images or the cache are not usable, or the model has no policies.
        VerificationError: the result does not run, or computes what is not finite.
    """
    progress("loading the bundle", 0.0)
    runtime = load(source, "onnxruntime", threads)
    runtime.adaptive_dispatcher("calibrate")
    bundle = runtime.bundle
    cache = options.calibration_cache or cache
    notes: list[str] = []
    files = find_calibration_images(options.calibration_images, bundle.labels, options.labels_by_order, notes.append)
    ranges, report = _ranges(runtime, files, options, cache, progress)
    report["notes"] = notes
    assigned = assign(bundle, ranges, "int8" if options.precision == "mixed" else options.precision)
    if options.precision == "mixed":
        assigned = _search(runtime, folder, ranges, files, options, report, progress)
        report["labels_by"] = labels_by(files)
    config = write_converted(bundle, folder, ranges, assigned, options, progress)
    report["method"] = None if options.precision == "fp16" else options.method
    report["engines"] = {
        name: {
            "samples": found.samples,
            "tokens": found.tokens,
            "precision": engine_precision(name, assigned, options.decision_precision),
        }
        for name, found in sorted(ranges.seen.items())
    }
    report["kept_higher"] = {
        name: {"precision": found.precision, "reason": found.reason} for name, found in assigned.items() if found.reason
    }
    return config, report, check_converted(runtime, folder, files, progress) if check else None


def _search(
    runtime: Runtime,
    folder: Path,
    ranges: Ranges,
    files: list[ImageFile],
    options: CalibrationOptions,
    report: dict[str, Any],
    progress: Progress,
) -> dict[str, Assignment]:
    """The assignment of mixed precision; its sensitivity table goes into the report."""
    bundles = {"fp32": runtime.bundle}
    assigned = {precision: assign(runtime.bundle, ranges, precision) for precision in ("fp16", "int8")}
    for precision, units in assigned.items():
        part = folder / f".{precision}"
        part.mkdir()
        write_converted(runtime.bundle, part, ranges, units, options, progress)
        bundles[precision] = Bundle.open(part)
    images, labels = read_images(files, runtime.preprocess)
    measure = Measure(bundles, runtime.options, options.decision_precision, images, labels)
    search = Search(measure, assigned["int8"], assigned["fp16"], options.max_drop, progress)
    found = search.run()
    report |= search.report()
    for precision in assigned:
        shutil.rmtree(folder / f".{precision}")
    return found


def write_converted(
    bundle: Bundle,
    folder: Path,
    ranges: Ranges,
    assigned: dict[str, Assignment],
    options: CalibrationOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Writes a bundle whose units have the precisions assigned to them; returns `config.json`'s content."""
    precisions = {
        name: engine_precision(name, assigned, options.decision_precision)
        for name, spec in bundle.engines.items()
        if not spec.wants_constants  # which are fixed in fp32 alone
    }
    engines = converted(bundle, ranges, assigned, options.method, precisions)
    about = {key: bundle.config[key] for key in ("name", "opset", "checkpoint")}
    about |= {"precision": options.precision, "statistics": ranges.statistics}
    return write_bundle(
        folder,
        engines,
        len(precisions),
        bundle.architecture,
        bundle.labels,
        bundle.preprocessor,
        about,
        progress,
        precisions,
    )


def _ranges(
    runtime: Runtime, files: list[ImageFile], options: CalibrationOptions, cache: Path, progress: Progress
) -> tuple[Ranges, dict[str, Any]]:
    """Ranges from the cache where they are of this model and these images, else measured, and cached."""
    bundle = runtime.bundle
    origin: Origin = {"model": _model_hash(bundle), "samples": options.samples, "seed": options.seed}
    origin["images"] = _hash_files([file.path for file in files])
    report: dict[str, Any] = {"cache": str(cache), "reused": False, "skipped": []}
    if cache.exists() or not files:
        ranges, of = load_ranges(cache)
        if of.get("model") != origin["model"]:
            raise InputError(
                f"{cache}: calibrated for another model, or other export options; delete it, or name another file "
                "with --calibration-cache"
            )
        if not files or of == origin:
            return ranges, report | {"reused": True, "images": ranges.images}
        log.warning("%s: of other images or settings; calibrating again", cache)
    recorder = Recorder(runtime, options.samples, options.seed)
    for done, file in enumerate(files, 1):
        try:
            pixels = runtime.preprocess(file.path)
        except InputError as error:
            report["skipped"].append(str(error))
        else:
            recorder.run(pixels)
        progress("running calibration images", done / len(files))
    if recorder.images < MIN_IMAGES:
        first = f"; first unreadable: {report['skipped'][0]}" if report["skipped"] else ""
        raise InputError(f"calibration needs at least {MIN_IMAGES} images, {recorder.images} can be read{first}")
    ranges = measure_ranges(bundle, recorder, progress)
    save_ranges(cache, ranges, origin)
    return ranges, report | {"images": ranges.images}


def _model_hash(bundle: Bundle) -> str:
    names = sorted(bundle.engines)
    return hashlib.sha256("".join(bundle.engines[name].sha256 for name in names).encode()).hexdigest()


def _hash_files(paths: list[Path]) -> str:
    """One hash of the content of files, in order; those that cannot be read count as empty."""
    total = hashlib.sha256()
    for path in paths:
        try:
            with open_regular(path) as file:
                total.update(hashlib.sha256(file.read()).digest())
        except OSError:
            total.update(hashlib.sha256().digest())
    return total.hexdigest()
