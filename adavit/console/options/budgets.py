"""What `adavit-export` is asked for in budgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from adavit.calibration.options import DEFAULT_IMAGES
from adavit.console.options.types import labels_by_order

__all__ = ["budget_options"]

Function = TypeVar("Function", bound=Callable[..., Any])


def budget_options(command: Function) -> Function:
    """Adds the options to a command."""
    for option in (
        labels_by_order,
        click.option(
            "--calibration-images",
            type=click.Path(path_type=Path),
            multiple=True,
            help="Image file or folder to calibrate on; class-named folders give labels. Adds statistics to a BUNDLE.",
        ),
        click.option(
            "--budget-images",
            type=int,
            metavar="N",
            help=f"Images to find operating points on, drawn at random where there are more; {DEFAULT_IMAGES} by "
            "default. The search takes time in proportion.",
        ),
        click.option(
            "--budgets",
            callback=_shares,
            metavar="SHARES",
            help="Operating points to add, as shares of the dense MACs, such as 0.3,0.5.",
        ),
    ):
        command = option(command)
    return command


def _shares(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    """The numbers of a list with commas."""
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of shares such as 0.3,0.5") from None
