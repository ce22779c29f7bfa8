"""What `adavit-export` is asked for in precision and calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from adavit.bundle.bundle import PRECISIONS
from adavit.errors import OptionError, shown
from adavit.option_types import Finite

__all__ = ["METHODS", "PRECISIONS", "CalibrationOptions", "calibration_options"]

METHODS = ("entropy", "max", "percentile")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class CalibrationOptions:
    """Precisions of a bundle, the default first, and what they are calibrated on; see `adavit-export --help`."""

    precisions: tuple[str, ...] = ("fp32",)
    calibration_images: tuple[Path, ...] = ()
    calibration_cache: Path | None = None
    samples: int = 64
    method: str = "max"
    max_drop: float = 0.3
    seed: int = 0
    labels_by_order: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> CalibrationOptions:
        """Takes its options out of a command's, but for the images, which budgets are calibrated on too."""
        shared = {"calibration_images", "labels_by_order"}
        own = {field.name for field in fields(cls)} - shared
        return cls(**{name: options[name] for name in shared}, **{name: options.pop(name) for name in own})

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The precisions that are calibrated: all but fp32."""
        return tuple(name for name in self.precisions if name != "fp32")

    def check(self) -> None:
        """Raises OptionError where the options do not fit together."""
        names: Any = self.precisions
        if not isinstance(names, tuple) or not names or not set(names) <= set(PRECISIONS):
            raise OptionError(f"precision is {shown(names)}: choose from {', '.join(PRECISIONS)}")
        if len(set(names)) != len(names):
            raise OptionError("--precision: a precision is given twice")
        if not self.calibrated:
            return
        if not self.calibration_images and self.calibration_cache is None:
            asked = ",".join(self.precisions)
            raise OptionError(f"--precision {asked} needs --calibration-images, or a --calibration-cache")
        if "mixed" in self.precisions and not self.calibration_images:
            raise OptionError("--precision mixed measures accuracy on images: give --calibration-images")


def calibration_options(command: Function) -> Function:
    """Adds the options to a command."""
    path = click.Path(path_type=Path)
    for option in reversed(
        [
            click.option(
                "--precision",
                "precisions",
                callback=_precisions,
                metavar="NAMES",
                default="fp32",
                show_default=True,
                help=f"Number formats to write, such as fp32,int8, of {', '.join(PRECISIONS)}; the first runs by "
                "default.",
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
                help="Inputs kept for each sub-layer, chosen at random of all the images'.",
            ),
            click.option(
                "--method",
                type=click.Choice(METHODS),
                default="max",
                show_default=True,
                help="How int8 ranges are chosen.",
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


def _precisions(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """The names of a list with commas."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PRECISIONS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PRECISIONS)}; give a list such as fp32,int8")
    if len(set(names)) != len(names):
        raise click.BadParameter("a precision is given twice")
    return names
