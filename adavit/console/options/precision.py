"""What `adavit-export` is asked for in precision and calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from adavit.bundle.bundle import PRECISIONS
from adavit.calibration.options import METHODS
from adavit.console.options.types import Finite

__all__ = ["calibration_options"]

Function = TypeVar("Function", bound=Callable[..., Any])


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
                help="File of ranges: read where it is there, else written.  [default: OUTPUT.calibration.npz; no file "
                "for --single-file]",
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
