"""Images through a bundle: predictions, accuracy, and what the policies kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.policy import Policy
from adavit.datasets.image_files import ImageFile
from adavit.drawing import Sample
from adavit.errors import InputError
from adavit.measure.benchmark import Images, Progress
from adavit.measure.listed_images import spread_over_classes
from adavit.measure.options import RunOptions
from adavit.results import Result
from adavit.runtime.session import Runtime

__all__ = ["Evaluation", "evaluate", "readable"]

SHOWN = 20
"""Images whose predictions are listed."""
HELD = 256 << 20
"""Bytes of preprocessed images kept for the measurement."""


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


def evaluate(
    runtime: Runtime, files: list[ImageFile], options: RunOptions, replayed: Policy | None, progress: Progress
) -> Evaluation:
    """Runs every readable image once; raises InputError where there are images and none is readable."""
    seen = Evaluation()
    room = max(1, HELD // (4 * 3 * runtime.architecture.image_size**2))
    stride = math.ceil(len(files) / room)
    for done, (batch, pixels) in enumerate(readable(runtime, files, options.batch, seen), 1):
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


def readable(
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
