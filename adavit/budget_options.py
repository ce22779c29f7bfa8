"""What `adavit-export` is asked for in budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from adavit.errors import OptionError
from adavit.option_types import labels_by_order

__all__ = ["DEFAULT_IMAGES", "FEWEST_IMAGES", "BudgetOptions", "budget_options"]

FEWEST_IMAGES, DEFAULT_IMAGES = 16, 512
"""Images to find operating points on: as few as will do, and as many as are taken of more."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class BudgetOptions:
    """Budgets asked for, and the images to meet them on; see `adavit-export --help`."""

    budgets: tuple[float, ...] = ()
    calibration_images: tuple[Path, ...] = ()
    budget_images: int | None = None
    labels_by_order: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> BudgetOptions:
        """Takes its options out of a command's."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    def check(self) -> None:
        """Raises OptionError where the options do not make sense."""
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise OptionError(f"--budgets: {budget:g} is no share of the dense MACs; give numbers such as 0.3,0.5")
        if len(set(self.budgets)) != len(self.budgets):
            raise OptionError("--budgets: a budget is given twice")
        if self.budgets and not self.calibration_images:
            raise OptionError("--budgets needs --calibration-images")
        if self.budget_images is not None and not self.budgets:
            raise OptionError("--budget-images is of --budgets; give them too")
        if self.budget_images is not None and self.budget_images < FEWEST_IMAGES:
            raise OptionError(f"--budget-images: {self.budget_images} are too few; give at least {FEWEST_IMAGES}")
        if self.labels_by_order and not self.calibration_images:
            raise OptionError("--labels-by-order is of the class folders of --calibration-images; give them too")


def budget_options(command: Function) -> Function:
    """Adds the options to a command."""
    for option in (
        labels_by_order,
        click.option(
            "--calibration-images",
            type=click.Path(path_type=Path),
            multiple=True,
            help="Image file or folder to calibrate on; class-named folders give labels.",
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
