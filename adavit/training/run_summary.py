"""What a run found and is about to do, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adavit.console.progress import Stage
from adavit.console.stages import training_stages
from adavit.macs import dense_macs
from adavit.training.balance import ROUNDS, images_to_balance
from adavit.training.budget import expected_share
from adavit.training.data import LabelledImages
from adavit.training.loader import spread, steps_per_epoch
from adavit.training.log import counted
from adavit.training.loop import Intervals, Trainer

__all__ = ["Pictures", "expected_stages", "measure_pictures", "run_lines"]

SAMPLE = 256
STEP = 3
"""A training step's time, in forwards of its batch; a teacher adds one."""
NAMES = 5
"""Classes that are named."""


@dataclass(frozen=True)
class Pictures:
    """Sizes of pictures in pixels.

    Attributes:
        widths, heights: the least and the largest.
        side: the median of the short sides.
    """

    widths: tuple[int, int]
    heights: tuple[int, int]
    side: int

    def __str__(self) -> str:
        return f"{_range(self.widths)} x {_range(self.heights)} pixels"


def measure_pictures(data: LabelledImages) -> Pictures:
    """Sizes of about 256 pictures of a set, evenly spaced, by their headers."""
    sizes = np.array(data.sizes(spread(len(data.labels), SAMPLE)))
    (low_width, low_height), (width, height) = sizes.min(0).tolist(), sizes.max(0).tolist()
    return Pictures((low_width, width), (low_height, height), int(np.median(sizes.min(1))))


def run_lines(
    trainer: Trainer, train: LabelledImages, test: LabelledImages, pictures: Pictures, teacher: Path | None
) -> list[str]:
    """The data, the model, the targets and the length of a run."""
    arch, settings = trainer.model.arch, trainer.settings
    count = len(train.classes)
    lines = [
        f"data        {len(train.labels):,} training and {counted(len(test.labels), 'test image')} of {count} classes: "
        f"{_first(train.classes)}",
        f"pictures    {_trained_at(pictures, arch.image_size)}",
        f"model       {_model(trainer)}",
    ]
    unseen = np.bincount(train.labels, minlength=count) == 0
    if unseen.any():
        names = [name for name, missing in zip(train.classes, unseen, strict=True) if missing]
        lines.insert(1, f"            {len(names)} of the classes have no training image: {_first(names)}")
    if settings.policy:
        targets = settings.policy.targets
        named = ", ".join(f"{kind.replace('sub', 'sub-')} {share:.1%}" for kind, share in targets.items())
        lines.append(f"targets     {named}; about {expected_share(arch, targets):.0%} of the MACs")
    if teacher:
        lines.append(f"teacher     {teacher}")
    lines.append(f"run         {_run(trainer, len(train.labels))}")
    if looked := _images_to_balance(trainer, train):
        images = counted(looked, "training image")
        lines.append(f"            then up to {ROUNDS} rounds over {images} to meet the targets")
    return lines


def expected_stages(trainer: Trainer, train: LabelledImages, test: LabelledImages, intervals: Intervals) -> list[Stage]:
    """What a run will do, for its progress."""
    settings, forward = trainer.settings, dense_macs(trainer.model.arch)
    steps = settings.steps - trainer.step
    tested = len(spread(len(test.labels), intervals.images))
    between = (settings.steps - 1) // intervals.evaluate - trainer.step // intervals.evaluate if steps else 0
    trained = steps * settings.batch * (STEP + (trainer.teacher is not None)) + between * tested
    balanced = ROUNDS * _images_to_balance(trainer, train)
    return training_stages(forward * trained, forward * balanced, forward * tested * (not trainer.ended))


def _images_to_balance(trainer: Trainer, train: LabelledImages) -> int:
    """How many images each round of meeting the targets looks at; 0 where there is none to come."""
    return 0 if trainer.ended else images_to_balance(train, trainer.settings.policy)


def _range(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return f"{low}" if low == high else f"{low} to {high}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES]) + (", ..." if len(names) > NAMES else "")


def _trained_at(pictures: Pictures, side: int) -> str:
    same = pictures.widths == pictures.heights == (side, side)
    return f"{pictures}; trained at {side} x {side} pixels" + ("" if same else ", resized")


def _model(trainer: Trainer) -> str:
    arch = trainer.model.arch
    weights = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"{counted(arch.depth, 'block')} of width {arch.width}, {counted(arch.heads, 'head')}, {arch.stem} stem, "
        f"{arch.patches} patches of {arch.patch_size} x {arch.patch_size} pixels, {weights / 1e6:.2f} M parameters"
    )


def _run(trainer: Trainer, images: int) -> str:
    settings, world = trainer.settings, trainer.world
    threads = torch.get_num_threads()
    cpu = counted(threads, "CPU thread")
    device = cpu if world.device.type == "cpu" else world.device.type.upper()
    several = f", in {world.size} processes" if world.size > 1 else ""
    epochs = settings.steps / steps_per_epoch(images, settings.batch)
    words = "epoch" if f"{epochs:.3g}" == "1" else "epochs"
    begun = f"goes on at step {trainer.step:,} of" if trainer.step else ""
    return (
        f"{begun} {counted(settings.steps, 'step')} of {counted(settings.batch, 'image')}, {epochs:.3g} {words}, "
        f"{settings.precision}, on {device}{several}"
    ).strip()
