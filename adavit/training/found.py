"""What a run found and is about to do, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adavit.training.budget import expected_share
from adavit.training.data import LabelledImages
from adavit.training.loader import spread, steps_per_epoch
from adavit.training.loop import Trainer

__all__ = ["Pictures", "measure_pictures", "run_lines"]

SAMPLE = 256
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
        f"data        {len(train.labels):,} training and {len(test.labels):,} test images of {count} classes: "
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
    return lines


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
        f"{arch.depth} blocks of width {arch.width}, {arch.heads} heads, {arch.stem} stem, {arch.patches} patches of "
        f"{arch.patch_size} x {arch.patch_size} pixels, {weights / 1e6:.2f} M parameters"
    )


def _run(trainer: Trainer, images: int) -> str:
    settings, world = trainer.settings, trainer.world
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU thread" + ("s" if threads > 1 else "")
    device = cpu if world.device.type == "cpu" else world.device.type.upper()
    several = f", in {world.size} processes" if world.size > 1 else ""
    epochs = settings.steps / steps_per_epoch(images, settings.batch)
    begun = f"goes on at step {trainer.step:,} of" if trainer.step else ""
    return (
        f"{begun} {settings.steps:,} steps of {settings.batch} images, {epochs:.3g} epochs, "
        f"{settings.precision}, on {device}{several}"
    ).strip()
