"""Numbers as the commands' options take them, and an option that all of them share."""

from __future__ import annotations

import math
from typing import Any

import click

from adavit.cpus import usable_cpus

__all__ = ["Finite", "Threads", "labels_by_order"]

labels_by_order = click.option(
    "--labels-by-order",
    is_flag=True,
    help="Match class folders with labels by their order, where no name fits and there are as many.",
)


class Finite(click.FloatRange):
    """A range of numbers, of which NaN and infinity are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.FloatRange`."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


PER_CPU = 4
"""Threads for each CPU at most: very many wait for each other without end."""


class Threads(click.IntRange):
    """A number of threads, no more than a few for each CPU."""

    def __init__(self) -> None:
        super().__init__(1, 1024)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.IntRange`."""
        found = super().convert(value, param, ctx)
        if found > (most := PER_CPU * usable_cpus()):
            reason = f"at most {most}, {PER_CPU} for each CPU that this process may use."
            self.fail(f"{found} threads are too many; give {reason}", param, ctx)
        return found
