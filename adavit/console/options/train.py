"""The options of `adavit-train`, in the groups that its help shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cloup
from click import option

from adavit.console.options.types import Finite, Threads, labels_by_order

__all__ = [
    "adaptive_options", "comparison_options", "data_options", "dense_options", "report_options", "run_options",
    "teacher_options", "training_options",
]  # fmt: skip

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

PATH = click.Path(path_type=Path)
MODEL = "CHECKPOINT|BUNDLE"
POSITIVE, COUNT, SEED = click.IntRange(min=1), click.IntRange(min=0), click.IntRange(0, 2**31 - 1)
SHARE = Finite(0, 1)
MOST = 10**6  # far more than is of use, far less than a float32 can hold
AMOUNT = Finite(0, MOST)
ABOVE_0 = Finite(0, MOST, min_open=True)

THREADS = option("--threads", type=Threads(), help="CPU threads.")
OUTPUT = (
    option("--output", "-o", type=PATH, required=True, help="Folder for checkpoint, log, plot and weights."),
    option("--resume", is_flag=True, help="Go on where the run in --output stopped; give the same options."),
)


def _given(name: str, type: Any, default: Any, help: str) -> Decorator:
    """An option whose help shows its default."""
    return option(name, type=type, default=default, show_default=True, help=help)


def data_options(output: bool) -> Decorator:
    """Adds the options about data, and those about the folder that a run writes."""
    return cloup.option_group(
        "Data and output" if output else "Data",
        option("--data", type=PATH, required=True, help="Folder with train/ and val/, or with IDX files."),
        *(OUTPUT if output else ()),
        option("--labels", type=PATH, help="Text file with one class name a line, in label order."),
        *(() if output else (labels_by_order,)),
        _given("--corrupt", click.Choice(["refuse", "skip"]), "refuse", "What to do with unreadable images."),
        option("--crop", type=Finite(0.1, 1), help="Share of the resized short side that evaluation keeps.  "
               "[default: what the weights note, or 1 up to 64 pixels, else 0.9]"),
    )  # fmt: skip


dense_options = cloup.option_group(
    "Model",
    option("--from", "source", type=PATH, help="Weights to start from: T2T-ViT, DeiT, timm or an earlier run."),
    option("--image-size", type=POSITIVE, help="Side in pixels that pictures are resized to.  "
           "[default: that of --from, or the pictures' own from 28 to 224; 224 for a t2t stem]"),
    option("--patch-size", type=POSITIVE, help="Pixels per patch side.  "
           "[default: that of --from, or the least of 4, 8 and 16 that gives up to 256 patches; 16 for a t2t stem]"),
    option("--depth", type=POSITIVE, help="Blocks; fewer than --from has take evenly spaced ones.  "
           "[default: that of --from, or 8]"),
    option("--width", type=POSITIVE, help="Token width.  [default: that of --from, or 192]"),
    option("--heads", type=POSITIVE, help="Attention heads.  [default: width / 64]"),
    option("--hidden", type=POSITIVE, help="Hidden width of the MLP.  [default: that of --from, or 3 x width]"),
    option("--stem", type=click.Choice(["patch", "t2t"]), help="Stem.  [default: that of --from, or patch]"),
    option("--start", "initial", type=click.Choice(["normal", "mimetic"]), default="normal", show_default=True,
           help="Weights without --from: small and random, or with attention that looks at its own place, "
           "which suits little data."),
)  # fmt: skip
"""Adds the options about a dense model."""

_source = cloup.option_group(
    "Model",
    option("--from", "source", type=PATH, required=True, help="Dense weights: the start, and the teacher."),
    option("--heads", type=POSITIVE, help="Attention heads, where the weights do not tell."),
    option("--patch-size", type=POSITIVE, help="Pixels per patch side.  [default: that of --from]"),
)
_policies = cloup.option_group(
    "Policies",
    option("--budget", type=SHARE, help="Share of the dense MACs; sets the targets that are not given."),
    option("--policies", default="tokens,heads,sublayers", show_default=True, help="Which policies to train."),
    option("--token-target", type=SHARE, help="Mean usage of tokens.  [default: by --budget, or 0.5]"),
    option("--head-target", type=SHARE, help="Mean usage of heads.  [default: by --budget, or 0.5]"),
    option("--sublayer-target", type=SHARE, help="Mean usage of sub-layers.  [default: by --budget, or 0.5]"),
    _given("--token-weight", AMOUNT, 2.0, "Weight of the token usage loss."),
    _given("--head-weight", AMOUNT, 2.0, "Weight of the head usage loss."),
    _given("--sublayer-weight", AMOUNT, 2.0, "Weight of the sub-layer usage loss."),
    _given("--policy-rate", AMOUNT, 10.0, "Learning rate of the decision layers over that of the rest."),
    _given("--temperature", ABOVE_0, 5.0, "Temperature of the Gumbel-sigmoid."),
    _given("--anneal", AMOUNT, 0.3, "Share of the run in which the noise falls to 0; 0 keeps it."),
    _given("--floor", SHARE, 0.0, "Least usage of a head or sub-layer."),
    _given("--floor-weight", AMOUNT, 0.0, "Weight of that floor."),
    _given("--entropy-weight", AMOUNT, 0.0, "Weight of the decisions' entropy."),
    _given("--diversity-weight", AMOUNT, 0.0, "Weight of the diversity term."),
    _given("--attention-weight", AMOUNT, 0.0, "Weight of the teacher's attention."),
    _given("--hidden-weight", AMOUNT, 0.0, "Weight of the teacher's hidden states."),
)


def adaptive_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options about an adaptive model and its policies."""
    return _source(_policies(command))


training_options = cloup.option_group(
    "Training",
    _given("--epochs", ABOVE_0, 10.0, "Passes over the training images."),
    option("--steps", type=POSITIVE, help="Optimiser steps, instead of --epochs."),
    _given("--batch", POSITIVE, 128, "Images a step, over all processes."),
    _given("--learning-rate", AMOUNT, 1e-3, "Learning rate after the warm-up."),
    _given("--warmup", COUNT, 100, "Steps of warm-up."),
    _given("--final", SHARE, 0.01, "Last learning rate over the first."),
    _given("--weight-decay", AMOUNT, 0.05, "Weight decay of matrices."),
    _given("--clip", AMOUNT, 1.0, "Bound on the norm of the gradient."),
    _given("--smoothing", SHARE, 0.1, "Label smoothing."),
    _given("--mixup", AMOUNT, 0.0, "Alpha of mixup; 0 for none."),
    option("--augment", type=click.Choice(["none", "shift", "crop"]),
           help="Augmentation.  [default: shift up to 64 pixels, else crop]"),
    option("--mirror/--no-mirror", default=True, show_default=True, help="Mirror half of the images."),
    _given("--token-drop", Finite(0, 1, max_open=True), 0.0,
           "Share of the patch tokens that a step leaves out, at random: cheaper steps."),
    _given("--ema", SHARE, 0.999, "Decay of the weights' average."),
    _given("--seed", SEED, 0, "Seed of everything random."),
)  # fmt: skip
"""Adds the options about the optimisation."""

teacher_options = cloup.option_group(
    "Distillation",
    option("--teacher", type=PATH, help="Model to distil from: dense weights, or a classifier as .onnx.  "
           "[default of adapt: --from]"),
    _given("--logit-weight", AMOUNT, 1.0, "Weight of the teacher's soft labels."),
    _given("--distillation-temperature", ABOVE_0, 1.0, "Temperature of the soft labels."),
)  # fmt: skip
"""Adds the options about whom to learn from."""

run_options = cloup.option_group(
    "Run",
    THREADS,
    _given("--workers", POSITIVE, 2, "Threads that decode images."),
    _given("--precision", click.Choice(["fp32", "bf16"]), "fp32", "bf16 is autocast."),
    option("--compile", is_flag=True, help="Compile the model (torch.compile): a slow start, faster steps."),
    _given("--log-every", POSITIVE, 20, "Steps between log records."),
    _given("--save-every", POSITIVE, 100, "Steps between checkpoints."),
    _given("--evaluate-every", POSITIVE, 500, "Steps between evaluations."),
    _given("--evaluate-images", COUNT, 0, "Test images of an evaluation; 0 for all."),
)
"""Adds the options about how a run is computed and recorded."""

comparison_options = cloup.option_group(
    "Comparison",
    option("--dense", type=PATH, metavar=MODEL,
           help="A dense model to compare with; its loss rates how hard an image is."),
    option("--baseline", type=PATH, metavar=MODEL,
           help="Another model to compare with, such as a dense one shrunk to the same MACs."),
    option("--random/--no-random", default=True, show_default=True, help="Compare with a random policy."),
    _given("--seed", SEED, 0, "Seed of that policy."),
)  # fmt: skip
"""Adds the options about what an evaluation compares with."""


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options about how an evaluation runs and what it writes."""
    run = cloup.option_group(
        "Run",
        _given("--images", COUNT, 0, "Test images; 0 for all."),
        _given("--batch", POSITIVE, 128, "Images at a time."),
        option("--heads", type=POSITIVE, help="Attention heads, where the checkpoint does not tell."),
        THREADS,
    )
    report = cloup.option_group(
        "Report",
        option("--plot", type=PATH, help="Write a plot (PNG)."),
        option("--json", "json_file", metavar="FILE|-", help="Write the report as JSON; - is standard output."),
    )
    return run(report(command))
