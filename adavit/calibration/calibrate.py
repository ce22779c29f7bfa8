"""From a bundle's fp32 graphs and images to graphs in other precisions, in the same bundle."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adavit.bundle.bundle import PREPROCESSING, GraphFiles
from adavit.bundle.graphs import Graphs
from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.calibration.cache import Origin, load_ranges, save_ranges
from adavit.calibration.check import check_converted
from adavit.calibration.convert import Assigned, assign, converted
from adavit.calibration.mixed import MOST_IMAGES, Measure, Search
from adavit.calibration.options import CalibrationOptions
from adavit.calibration.ranges import Ranges, measure_ranges
from adavit.calibration.recording import Recorder
from adavit.datasets.image_files import find_calibration_images, labels_by, read_images
from adavit.errors import InputError
from adavit.graphs.files import write_graphs
from adavit.reading import open_regular
from adavit.runtime.backend import create_backend
from adavit.runtime.loading import load
from adavit.runtime.session import Runtime

__all__ = ["Calibration"]

MIN_IMAGES = 16
"""Fewer tell too little about the ranges of any sub-layer."""

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]


class Calibration:
    """Writes a bundle's precisions beside its fp32 graphs; ranges are measured once, for all of them.

    Args:
        folder: the bundle, with fp32 graphs.
        options: what to calibrate on, and how.
        cache: the file of ranges to reuse or to write, where the options name none; None for no such file.
        threads: CPU threads.
        progress: told the stage and the share done.
        points: the operating points whose policies the images run under.

    Attributes:
        runtime: runs the fp32 graphs.
        files: the images to calibrate on.

    Raises:
        InputError: the images are not usable, or the model has no policies.
    """

    def __init__(
        self,
        folder: Path,
        options: CalibrationOptions,
        cache: Path | None,
        threads: int | None,
        progress: Progress,
        points: Sequence[Offsets] = (TRAINED,),
    ) -> None:
        progress("loading the bundle", 0.0)
        self._folder, self._options, self._progress, self._points = folder, options, progress, tuple(points)
        self._cache = options.calibration_cache or cache
        self.runtime = load(folder, "onnxruntime", threads, precision="fp32", specialise=False)
        self.runtime.adaptive_dispatcher("calibrate")
        self._notes: list[str] = []
        self.files = find_calibration_images(
            options.calibration_images, self.runtime.labels, options.labels_by_order, self._notes.append
        )

    def write(self, precision: str, folder: Path | None = None) -> tuple[GraphFiles, dict[str, Any]]:
        """Writes the weights and graphs of a precision into a folder of its name in the bundle, or in another folder.

        Returns:
            The files, and a report.

        Raises:
            InputError: the images or the cache are not usable, or `max_drop` cannot be met.
        """
        ranges, measured = self._measured
        report = {**measured, "notes": self._notes, "method": None if precision == "fp16" else self._options.method}
        if precision == "mixed":
            assigned, found = self._search(ranges)
            report |= found
        else:
            assigned = assign(self.runtime.architecture, ranges, precision)
        with_dense = self.runtime.graphs.files.dense is not None
        files = self._write(folder or self._folder, precision, ranges, assigned, with_dense, self._progress)
        report["sublayers"] = {
            sublayer.name: {**vars(ranges.seen[sublayer.name]), "precision": found.precision}
            for sublayer, found in assigned.items()
        }
        report["kept_higher"] = {
            sublayer.name: {"precision": found.precision, "reason": found.reason}
            for sublayer, found in assigned.items()
            if found.reason
        }
        return files, report

    def runtime_of(self, folder: Path, files: GraphFiles) -> Runtime:
        """Runs the graphs that were written into another folder."""
        bundle = replace(self.runtime.bundle, path=folder, graphs={files.precision: files})
        graphs, options = Graphs(bundle), self.runtime.options
        return Runtime(bundle, graphs, create_backend("onnxruntime", graphs, options), options, specialise=False)

    def check(self, precision: str) -> dict[str, Any]:
        """Runs a written precision, which `config.json` lists by now, beside fp32; see `check_converted`."""
        return check_converted(self.runtime, precision, self.files, self._progress)

    def _write(
        self, folder: Path, precision: str, ranges: Ranges, assigned: Assigned, with_dense: bool, progress: Progress
    ) -> GraphFiles:
        """Writes sub-layers in the precisions assigned to them."""
        graphs = self.runtime.graphs
        weights = {name: graphs.tensors.array(name) for name in graphs.tensors.tensors}
        tensors, units = converted(weights, assigned, ranges, self._options.method)
        opset = graphs.files.opset
        return write_graphs(folder, precision, graphs.architecture, tensors, opset, with_dense, progress, units)

    def _search(self, ranges: Ranges) -> tuple[Assigned, dict[str, Any]]:
        """The assignment of mixed precision, and its sensitivity table."""
        runtime, arch = self.runtime, self.runtime.architecture
        images, labels = read_images(self.files, runtime.preprocess, MOST_IMAGES)

        def make(assigned: Assigned) -> Runtime:
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".mixed") as folder:
                files = self._write(Path(folder), "mixed", ranges, assigned, False, lambda *_: None)
                return self.runtime_of(Path(folder), files)

        int8, fp16 = (assign(arch, ranges, precision) for precision in ("int8", "fp16"))
        measure = Measure(make, runtime.run(images).logits, images, labels)
        search = Search(measure, int8, fp16, self._options.max_drop, self._progress)
        assigned = search.run()
        return assigned, {**search.report(), "labels_by": labels_by(self.files)}

    @cached_property
    def _measured(self) -> tuple[Ranges, dict[str, Any]]:
        """Ranges from the cache where they are of this model and these images, else measured, and cached."""
        cache, options, files = self._cache, self._options, self.files
        origin: Origin = {"model": self._model_hash(), "samples": options.samples, "seed": options.seed}
        origin["images"] = _hash_files([file.path for file in files])
        if self._points != (TRAINED,):
            depth = self.runtime.architecture.depth
            origin["points"] = [[list(row) for row in offsets.by_block(depth)] for offsets in self._points]
        report: dict[str, Any] = {"cache": cache and str(cache), "reused": False, "skipped": []}
        if cache and (cache.exists() or not files):
            ranges, cached = load_ranges(cache)
            if cached.get("model") != origin["model"]:
                raise InputError(
                    f"{cache}: calibrated for another model, or other export options; delete it, or name another file "
                    "with `calibration_cache`"
                )
            if not files and cached.get("points") != origin.get("points"):
                raise InputError(f"{cache}: calibrated at another budget; give `calibration_images` to calibrate again")
            if not files or cached == origin:
                return ranges, report | {"reused": True, "images": ranges.images}
            log.warning("%s: of other images or settings; calibrating again", cache)
        recorder, report["skipped"] = self._recorded()
        ranges = measure_ranges(self.runtime.graphs, recorder, self._progress)
        if cache:
            save_ranges(cache, ranges, origin)
        return ranges, report | {"images": ranges.images}

    def _recorded(self) -> tuple[Recorder, list[str]]:
        """What the images show, and which of them cannot be read."""
        recorder, skipped = Recorder(self.runtime, self._options.samples, self._options.seed), []
        for done, file in enumerate(self.files, 1):
            try:
                pixels = self.runtime.preprocess(file.path)
            except InputError as error:
                skipped.append(str(error))
            else:
                recorder.run(pixels, self._points)
            self._progress("running calibration images", done / len(self.files))
        if recorder.images < MIN_IMAGES:
            first = f"; first unreadable: {skipped[0]}" if skipped else ""
            raise InputError(f"calibration needs at least {MIN_IMAGES} images, {recorder.images} can be read{first}")
        return recorder, skipped

    def _model_hash(self) -> str:
        """Of the weights in fp32, of whether there is a dense twin, and of what images go through."""
        files, texts = self.runtime.graphs.files, self.runtime.bundle.config["files"]
        parts = files.weights.sha256, texts[PREPROCESSING]["sha256"], files.dense is not None
        return hashlib.sha256(repr(parts).encode()).hexdigest()


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
