"""The graphs that a single file is made of: a bundle's, or int8 that is calibrated for the file; and how it decides."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adavit.bundle.bundle import Bundle
from adavit.bundle.operating_points import NO_POLICIES, Offsets
from adavit.bundle.policy import KINDS, Policy
from adavit.calibration.calibrate import Calibration
from adavit.calibration.check import checked_images, differs
from adavit.datasets.image_files import ImageFile
from adavit.errors import InputError, VerificationError
from adavit.export.single_options import SingleFileOptions
from adavit.export.single_verify import FileSession
from adavit.measure.agreement import Agreement
from adavit.measure.compare import BATCH
from adavit.results import Result
from adavit.runtime.loading import load
from adavit.runtime.session import Runtime

__all__ = ["FileGraphs", "compare_decisions", "graphs_of"]

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class FileGraphs:
    """What a single file is made of.

    Attributes:
        runtime: runs the graphs whose weights it takes.
        fp32: of a file in int8, runs the bundle in fp32; None where the bundle has none.
        calibration: the report of the file's own calibration, if it has one.
        files: the images that it was calibrated on.
        notes: what the user should know.
    """

    runtime: Runtime
    fp32: Runtime | None = None
    calibration: dict[str, Any] | None = None
    files: Sequence[ImageFile] = ()
    notes: tuple[str, ...] = ()


@contextmanager
def graphs_of(
    source: Path, bundle: Bundle, options: SingleFileOptions, points: Sequence[Offsets], progress: Progress
) -> Iterator[FileGraphs]:
    """The graphs in the precision that is asked for, as long as the context lasts.

    Args:
        source: what the user gave, for messages.
        bundle: it, or what was made of it.
        options: of the file.
        points: the operating points that int8 is calibrated at.
        progress: told the stage and the share done.

    Raises:
        InputError: the bundle lacks a precision, or calibration cannot be done.
    """

    def loaded(precision: str) -> Runtime:
        return load(bundle.path, threads=options.threads, precision=precision, specialise=False)

    if options.precision == "fp32":
        yield FileGraphs(loaded("fp32"))
        return
    _check_int8(source, bundle, options.calibration.measured)
    if not options.calibration.measured:
        if "fp32" in bundle.graphs:
            yield FileGraphs(loaded("int8"), loaded("fp32"))
        else:
            note = f"{source} has no fp32, so the decisions of the file are not compared with fp32's"
            yield FileGraphs(loaded("int8"), notes=(note,))
        return
    calibration = Calibration(bundle.path, options.calibration, None, options.threads, progress, points)
    with tempfile.TemporaryDirectory(prefix="adavit-") as scratch:
        files, report = calibration.write("int8", Path(scratch))
        yield FileGraphs(calibration.runtime_of(Path(scratch), files), calibration.runtime, report, calibration.files)


def _check_int8(source: Path, bundle: Bundle, calibrates: bool) -> None:
    """Raises InputError where there is no int8, and nothing to make it of."""
    if not bundle.architecture.adapts:
        raise InputError(f"{source}: {NO_POLICIES}; leave out `precision` int8")
    if calibrates and "fp32" not in bundle.graphs:
        raise InputError(
            f"{source} is in {', '.join(bundle.graphs)}: int8 is calibrated from fp32; give the checkpoint, or leave "
            "out what calibrates to take the bundle's own int8"
        )
    if not calibrates and "int8" not in bundle.graphs:
        raise InputError(f"{source} is not in int8; give `calibration_images` to calibrate the file on")


def compare_decisions(
    file: FileSession, path: str, graphs: FileGraphs, points: Sequence[tuple[float, Offsets]], progress: Progress
) -> dict[str, Any] | None:
    """Runs a file in int8 beside the bundle in fp32, on images as `check_converted` takes them.

    Args:
        file: it, or the same file that tells what it keeps.
        path: the file's, for messages.
        graphs: what it was made of.
        points: the operating points to compare at, each a budget, which is 0 for the trained policy, and its offsets.
        progress: told the stage and the share done.

    Returns:
        Which images ran, whether the file decides differently at any of the points, and for each of them the numbers
        of `Agreement`. None where there is no fp32.

    Raises:
        VerificationError: the file does not run, or makes logits that are not finite.
        InputError: none of the images can be read.
    """
    runtime = graphs.fp32
    if runtime is None:
        return None
    source, images, labels = checked_images(runtime, graphs.files)
    found = []
    for done, (budget, offsets) in enumerate(points):
        agreement = Agreement(runtime.architecture)
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            made = file.run(some, np.full(len(some), budget, np.float32))
            if not np.isfinite(made["logits"]).all():
                raise VerificationError(f"{path}: makes logits that are not finite")
            own = Result(made["logits"], Policy(*(made[kind] for kind in KINDS)), runtime.architecture)
            agreement.add(runtime.run(some, budget=offsets), own, labels[start : start + BATCH])
            progress("checking the precision", (done + min(1.0, (start + BATCH) / len(images))) / len(points))
        found.append({"budget": budget or None, **agreement.report()})
    return {"input": source, "differs": any(map(differs, found)), "points": found}
