"""`adavit-train evaluate`: accuracy, MACs and usage of a checkpoint or a bundle, beside other models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adavit.architecture import Architecture
from adavit.bundle.demo import names_demo
from adavit.bundle.preprocessing import Preprocessor
from adavit.datasets.class_folders import folded
from adavit.files import find_folder
from adavit.model import AdaViT, load_checkpoint
from adavit.model import policy as P
from adavit.model.notes import read_classes
from adavit.runtime import Runtime, load
from adavit.training.checks import check_packages
from adavit.training.configure import choose_crop, read_class_names, set_threads
from adavit.training.data import LabelledImages, open_images
from adavit.training.errors import DataError
from adavit.training.loader import evaluation_batches, spread, watched
from adavit.training.log import Progress, counted
from adavit.training.plot import plot_evaluation
from adavit.training.predict import Predictions, predict, predict_bundle
from adavit.training.report import RandomPolicy, evaluation_report

__all__ = ["evaluate", "report_lines"]

Options = dict[str, Any]
OTHERS = ("dense", "baseline")


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        model: a checkpoint's model, or the runtime of a bundle.
        path: its file or folder.
        prepare: how its images are prepared.
    """

    model: AdaViT | Runtime
    path: Path
    prepare: Preprocessor

    @property
    def arch(self) -> Architecture:
        """Its shapes."""
        return self.model.architecture if isinstance(self.model, Runtime) else self.model.arch

    def labels(self) -> list[str]:
        """Its class names: those of its bundle, those that its weights note, or numbers."""
        if isinstance(self.model, Runtime):
            return list(self.model.labels)
        noted, count = read_classes(self.path), self.arch.classes
        if len(noted) == count:
            return noted
        if noted:
            warnings.warn(
                f"{self.path}: notes {len(noted)} class names for {count} classes; numbers name its classes, "
                "give --labels",
                stacklevel=2,
            )
        return [str(index) for index in range(count)]


def evaluate(options: Options, progress: Progress) -> Options:
    """The report as plain values.

    Everything that can be wrong with options, files and packages is found before the first image runs.
    """
    _check_targets(options)
    set_threads(options)
    main = _open(options["source"], options, options["heads"])
    names = read_class_names(options["labels"]) or main.labels()
    test = open_images(options["data"], "test", options["corrupt"], names, options["labels_by_order"])
    _require_classes(main, test, options["data"])
    others = {name: _open(options[name], options, main.arch.heads) for name in OTHERS if options[name]}
    for other in others.values():
        if _reordered(other.labels(), test.classes):
            raise DataError(f"{other.path}: has the classes in another order; compare models of one order")
        _require_classes(other, test, options["data"])
    by_chance = options["random"] and main.arch.adapts
    run = _Runner(test, options, 1 + len(others) + by_chance, progress)
    found = run(main)
    beside = {name: run(other) for name, other in others.items()}
    chance = run(main, RandomPolicy(found, main.arch, options["seed"])) if by_chance else None
    baseline = (beside["baseline"], others["baseline"].arch) if "baseline" in others else None
    report = evaluation_report(found, main.arch, test.classes, beside.get("dense"), chance, baseline)
    report["labels_by"] = test.labels_by
    if options["plot"]:
        plot_evaluation(report, options["plot"])
    return report


class _Runner:
    """Runs models over the test images, with one progress for all of them."""

    def __init__(self, test: LabelledImages, options: Options, models: int, progress: Progress) -> None:
        self._test, self._batch, self._models = test, options["batch"], models
        self._chosen = spread(len(test.labels), options["images"])
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._progress, self._done = progress, 0

    def __call__(self, candidate: Candidate, chance: RandomPolicy | None = None) -> Predictions:
        batches = evaluation_batches(self._test, self._chosen, candidate.prepare, self._batch)
        batches = watched(batches, len(self._chosen), self._tell())
        if isinstance(candidate.model, Runtime):
            return predict_bundle(candidate.model, batches, chance.policy if chance else None)
        return predict(candidate.model.to(self._device), batches, chance or P.decide)

    def _tell(self) -> Callable[[float], None]:
        before = self._done
        self._done += 1
        return lambda share: self._progress("evaluating", (before + share) / self._models)


def report_lines(report: Options) -> list[str]:
    """An evaluation for people."""
    by = ", labelled by the order of their folders" if report["labels_by"] == "order" else ""
    lines = [
        f"accuracy    {report['accuracy']:.2%} of {counted(report['images'], 'image')}{by}",
        f"MACs        {report['macs']:.1%} of dense",
        f"usage       {_shares(report['usage'])}: what ran, over all blocks",
    ]
    if report["adapts"]:
        lines.append(f"targets     {_shares(report['target_usage'])}: usage as the targets of training count it")
    if "dense" in report:
        lines.append(f"dense       {report['dense']['accuracy']:.2%}; {report['accuracy_of_dense']:.2%} of it kept")
    if "random_policy" in report:
        found = report["random_policy"]
        lines.append(f"random      {found['accuracy']:.2%} with a random policy at {found['macs']:.1%} of dense")
    if "baseline" in report:
        found = report["baseline"]
        lines.append(f"baseline    {found['accuracy']:.2%} at {found['macs']:.1%} of dense")
    for name, units in report["constant"].items():
        lines.append(f"{name:<6} used {', '.join(units) or 'none'}")
    easy, hard = report["difficulty"]["parts"][0], report["difficulty"]["parts"][-1]
    lines.append(
        f"easy, hard  {easy['macs']:.1%} of the MACs for the easiest fifth, {hard['macs']:.1%} for the hardest"
    )
    return lines


def _shares(usage: dict[str, float]) -> str:
    return f"tokens {usage['tokens']:.1%}, heads {usage['heads']:.1%}, sub-layers {usage['sublayers']:.1%}"


def _check_targets(options: Options) -> None:
    if options["plot"]:
        check_packages("matplotlib")


def _open(path: Path, options: Options, heads: int | None) -> Candidate:
    crop = options["crop"]
    if names_demo(path) or find_folder(path).is_dir():
        runtime = load(path, threads=options["threads"], parallel="samples", specialise=False)
        own = runtime.bundle.preprocessor
        return Candidate(runtime, path, replace(own, crop_ratio=crop or own.crop_ratio))
    model = load_checkpoint(path, heads).eval()
    side = model.arch.image_size
    return Candidate(model, path, Preprocessor(side, choose_crop(crop, path, side)))


def _require_classes(candidate: Candidate, test: LabelledImages, data: Path) -> None:
    if len(test.classes) != candidate.arch.classes:
        raise DataError(
            f"{data}: {len(test.classes)} classes, the model has {candidate.arch.classes}: {candidate.path}"
        )


def _reordered(theirs: list[str], classes: list[str]) -> bool:
    """Whether both are the same names in another order, as they are written or but for their case."""
    alike = [folded(name) for name in theirs], [folded(name) for name in classes]
    return any(one != other and sorted(one) == sorted(other) for one, other in (alike, (theirs, classes)))
