"""What `adavit-export` is asked for in precision and calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from adavit.errors import OptionError
from adavit.option_types import Finite

__all__ = ["METHODS", "PRECISIONS", "CalibrationOptions", "calibration_options"]

METHODS = ("entropy", "max", "percentile")
PRECISIONS = ("fp32", "fp16", "int8", "mixed")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class CalibrationOptions:
    """Precision of a bundle's engines, and what it is calibrated on; see `adavit-export --help`."""

    precisions: tuple[str, ...] = ("fp32",)
    calibration_images: tuple[Path, ...] = ()
    calibration_cache: Path | None = None
    samples: int = 64
    method: str = "max"
    decision_precision: str = "fp32"
    max_drop: float = 0.3
    seed: int = 0
    labels_by_order: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> CalibrationOptions:
        """Takes its options out of a command's, but for the images, which budgets are calibrated on too."""
        shared = {"calibration_images", "labels_by_order"}
        own = {field.name for field in fields(cls)} - shared
        return cls(**{name: options[name] for name in shared}, **{name: options.pop(name) for name in own})

    def check(self, opset: int) -> None:
        """Raises OptionError where the options do not fit together, ModuleNotFoundError without Model Optimizer."""
        if self.precision == "fp32":
            if self.decision_precision != "fp32":
                raise OptionError("--decision-precision needs --precision fp16, int8 or mixed")
            return
        if find_spec("modelopt") is None:
            raise ModuleNotFoundError("No module named 'modelopt'", name="modelopt")
        if opset < 19:
            raise OptionError(f"--precision {self.precision} needs --opset 19 or newer")
        if not self.calibration_images and self.calibration_cache is None:
            raise OptionError(f"--precision {self.precision} needs --calibration-images, or a --calibration-cache")
        if self.precision == "mixed" and not self.calibration_images:
            raise OptionError("--precision mixed measures engines on images: give --calibration-images")


def calibration_options(command: Function) -> Function:
    """Adds the options to a command."""
    path = click.Path(path_type=Path)
    for option in reversed(
        [
            click.option(
                "--precision",
                type=click.Choice(PRECISIONS),
                default="fp32",
                show_default=True,
                help="Number format of the engines.",
            ),
            click.option(
                "--calibration-cache",
                type=path,
                metavar="FILE",
                help="File of ranges: read where it is there, else written.  [default: OUTPUT.calibration.npz]",
            ),
            click.option(
                "--samples",
                type=click.IntRange(16, 4096),
                metavar="N",
                default=64,
                show_default=True,
                help="Inputs kept for each engine, chosen at random of all the images'.",
            ),
            click.option(
                "--method",
                type=click.Choice(METHODS),
                default="max",
                show_default=True,
                help="How int8 ranges are chosen.",
            ),
            click.option(
                "--decision-precision",
                type=click.Choice(["fp32", "fp16"]),
                default="fp32",
                show_default=True,
                help="Number format of the engines that decide.",
            ),
            click.option(
                "--max-drop",
                type=Finite(0, 100),
                metavar="X",
                default=0.3,
                show_default=True,
                help="Points of accuracy (agreement, without labels) that --precision mixed may lose.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(0),
                metavar="N",
                default=0,
                help="Seed of the choice of inputs.  [default: 0]",
            ),
        ]
    ):
        command = option(command)
    return command
