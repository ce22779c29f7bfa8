"""The options that `adavit-train dense` and `adavit-train adapt` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from adavit.option_types import Finite, Threads

__all__ = ["ABOVE_0", "AMOUNT", "PATH", "POSITIVE", "SHARE", "data_options", "run_options", "teacher_options"]

PATH = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
SHARE = Finite(0, 1)
MOST = 10**6  # far more than is of use, far less than a float32 can hold
AMOUNT = Finite(0, MOST)
ABOVE_0 = Finite(0, MOST, min_open=True)

Decorated = Callable[..., Any]

DATA = (
    click.option("--data", type=PATH, required=True, help="Folder with train/ and val/, or with IDX files."),
    click.option("--labels", type=PATH, help="Text file with one class name a line, in label order."),
    click.option("--corrupt", type=click.Choice(["refuse", "skip"]), default="refuse", show_default=True,
                 help="What to do with unreadable images."),
    click.option("--crop", type=Finite(0.1, 1), help="Share of the resized short side that "
                 "evaluation keeps.  [default: what the weights note, or 1 up to 64 pixels, else 0.9]"),
    click.option("--threads", type=Threads(), help="CPU threads."),
)  # fmt: skip

RUN = (
    click.option("--output", "-o", type=PATH, required=True, help="Folder for checkpoint, log, plot and weights."),
    click.option("--resume", is_flag=True, help="Go on where the run in --output stopped; give the same options."),
    click.option("--epochs", type=ABOVE_0, default=10.0, show_default=True,
                 help="Passes over the training images."),
    click.option("--steps", type=POSITIVE, help="Optimiser steps, instead of --epochs."),
    click.option("--batch", type=POSITIVE, default=128, show_default=True, help="Images a step, over all processes."),
    click.option("--learning-rate", type=AMOUNT, default=1e-3, show_default=True, help="After the warm-up."),
    click.option("--warmup", type=click.IntRange(min=0), default=100, show_default=True, help="Steps of warm-up."),
    click.option("--final", type=SHARE, default=0.01, show_default=True, help="Last learning rate over the first."),
    click.option("--weight-decay", type=AMOUNT, default=0.05, show_default=True, help="Of matrices."),
    click.option("--clip", type=AMOUNT, default=1.0, show_default=True, help="Bound on the norm of the gradient."),
    click.option("--smoothing", type=SHARE, default=0.1, show_default=True, help="Label smoothing."),
    click.option("--mixup", type=AMOUNT, default=0.0, show_default=True, help="Alpha of mixup; 0 for none."),
    click.option("--augment", type=click.Choice(["none", "shift", "crop"]),
                 help="Augmentation.  [default: shift up to 64 pixels, else crop]"),
    click.option("--mirror/--no-mirror", default=True, show_default=True, help="Mirror half of the images."),
    click.option("--token-drop", type=Finite(0, 1, max_open=True), default=0.0, show_default=True,
                 help="Share of the patch tokens that a step leaves out, at random: cheaper steps."),
    click.option("--ema", type=SHARE, default=0.999, show_default=True, help="Decay of the weights' average."),
    click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True,
                 help="bf16 is autocast."),
    click.option("--compile", is_flag=True, help="Compile the model (torch.compile): a slow start, faster steps."),
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of everything."),
    click.option("--log-every", type=POSITIVE, default=20, show_default=True, help="Steps between log records."),
    click.option("--save-every", type=POSITIVE, default=100, show_default=True, help="Steps between checkpoints."),
    click.option("--evaluate-every", type=POSITIVE, default=500, show_default=True, help="Steps between evaluations."),
    click.option("--evaluate-images", type=click.IntRange(min=0), default=0, show_default=True,
                 help="Test images of an evaluation; 0 for all."),
    click.option("--workers", type=POSITIVE, default=2, show_default=True, help="Threads that decode images."),
)  # fmt: skip


TEACHER = (
    click.option("--teacher", type=PATH, help="Model to distil from: dense weights, or a classifier as .onnx.  "
                 "[default of adapt: --from]"),
    click.option("--logit-weight", type=AMOUNT, default=1.0, show_default=True, help="Of the teacher's soft labels."),
    click.option("--distillation-temperature", type=ABOVE_0, default=1.0,
                 show_default=True, help="Of the soft labels."),
)  # fmt: skip


def data_options(command: Decorated) -> Decorated:
    """Adds the options about data."""
    return _add(DATA, command)


def run_options(command: Decorated) -> Decorated:
    """Adds the options about data and about a training run."""
    return _add(DATA + RUN, command)


def teacher_options(command: Decorated) -> Decorated:
    """Adds the options about whom to learn from."""
    return _add(TEACHER, command)


def _add(options: tuple[Callable[[Decorated], Decorated], ...], command: Decorated) -> Decorated:
    for option in reversed(options):
        command = option(command)
    return command
