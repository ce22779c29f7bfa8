"""What `adavit-export` is asked for, under the headings of its --help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from cloup import option_group

from adavit.console.options.budgets import budget_options
from adavit.console.options.precision import calibration_options
from adavit.console.options.single import single_options
from adavit.console.options.tensorrt import build_options
from adavit.console.options.types import Finite, Threads

__all__ = ["CALIBRATION_IMAGES", "EXPORTING", "EXPORT_EXAMPLES", "export_options"]

PATH = click.Path(path_type=Path)
CALIBRATION_IMAGES = ("calibration_images", "labels_by_order")
EXPORTING = (
    "with_dense",
    "opset",
    "labels",
    "image_size",
    "crop_ratio",
    "mean",
    "std",
    "license",
    "dataset",
    "verify",
    "force",
    "precisions",
    "calibration_cache",
    "samples",
    "method",
    "max_drop",
    "seed",
)
"""Options that only an export of a checkpoint follows."""
EXPORT_EXAMPLES = """
\b
Examples:
  adavit-export demo --output demo-bundle
  adavit-export weights.pth --output BUNDLE
  adavit-export weights.pth --output BUNDLE --precision fp32,int8 --calibration-images photos/
  adavit-export BUNDLE --single-file model.onnx --budget-input
  adavit-export BUNDLE --budgets 0.3,0.5 --calibration-images photos/
  adavit-export BUNDLE --target tensorrt-rtx
  adavit-export --check BUNDLE --against weights.pth

ADAVIT_PROGRESS=0 in the environment turns progress off.
"""
Function = TypeVar("Function", bound=Callable[..., Any])

BUNDLE = option_group(
    "Bundle",
    click.option("--output", "-o", type=PATH, help="Folder to write the bundle to."),
    click.option("--force", is_flag=True, help="Replace an existing bundle."),
    click.option(
        "--with-dense/--no-dense",
        default=True,
        show_default=True,
        help="Bring the dense twin along, which adavit-run compares speed with; it takes the same weights.",
    ),
    click.option("--labels", type=PATH, help="Text file with one class name a line."),
    click.option(
        "--image-size",
        type=click.IntRange(1),
        metavar="N",
        help="Side of the input in pixels; interpolates the position embedding.",
    ),
    click.option(
        "--crop-ratio",
        type=Finite(0.1, 1),
        metavar="X",
        help="Share of the short side the crop keeps.  [default: as noted, or 0.9]",
    ),
    click.option(
        "--mean",
        type=Finite(-1000, 1000),
        nargs=3,
        metavar="R G B",
        help="What is subtracted of pixels in [0, 1].  [default: ImageNet's, 0.485 0.456 0.406]",
    ),
    click.option(
        "--std",
        type=Finite(0, 1000, min_open=True),
        nargs=3,
        metavar="R G B",
        help="What that is divided by.  [default: ImageNet's, 0.229 0.224 0.225; some of timm's ViTs want 0.5 0.5 0.5]",
    ),
    click.option(
        "--heads", type=click.IntRange(1), metavar="N", help="Attention heads, where the checkpoint does not tell."
    ),
    click.option(
        "--license",
        metavar="ID",
        help="The weights' licence, for the model card, such as apache-2.0.  [default: as noted]",
    ),
    click.option(
        "--dataset",
        "dataset",
        metavar="ID",
        multiple=True,
        help="A data set of the Hugging Face Hub that the weights learned from, for the card; repeat it for more.  "
        "[default: as noted]",
    ),
    click.option("--opset", type=int, metavar="N", default=20, show_default=True, help="ONNX operator set."),
)
CHECKS = option_group(
    "Checks",
    click.option("--verify/--no-verify", default=True, help="Run the bundle against the checkpoint before it is kept."),
    click.option("--check", type=PATH, metavar="BUNDLE", help="Verify an existing bundle instead of exporting."),
    click.option("--against", type=PATH, metavar="CHECKPOINT", help="The checkpoint that --check compares with."),
)
BUDGETS = option_group("Budgets, and images to calibrate on", budget_options)
PRECISION = option_group("Precision, calibrated on --calibration-images", calibration_options)
SINGLE_FILE = option_group("One ONNX file, in the place of a bundle", single_options)
TENSORRT = option_group("TensorRT", build_options)
GENERAL = option_group(
    "Report and threads",
    click.option("--json", "json_file", metavar="FILE|-", help="Write a report as JSON; - is standard output."),
    click.option("--threads", type=Threads(), metavar="N", help="CPU threads.  [default: all this process may use]"),
)


def export_options(command: Function) -> Function:
    """Adds the options to the command."""
    for group in (GENERAL, TENSORRT, SINGLE_FILE, PRECISION, BUDGETS, CHECKS, BUNDLE):
        command = group(command)
    return command
