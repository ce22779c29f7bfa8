"""What `adavit-export` is asked for in TensorRT engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from adavit.bundle.engine_set import FLAVOURS, MOST_BATCH

__all__ = ["build_options"]

F = TypeVar("F", bound=Callable[..., Any])


def _capabilities(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    """86,8.9,sm_120 as (86, 89, 120)."""
    if value is None:
        return ()
    found = [part.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "") for part in value.split(",")]
    if not all(part.isdecimal() and 2 <= len(part) <= 3 for part in found):
        raise click.BadParameter(f"{value!r} is no list of compute capabilities such as 86,89,120")
    return tuple(sorted({int(part) for part in found}))


_OPTIONS = (
    click.option(
        "--target",
        type=click.Choice(sorted(FLAVOURS)),
        multiple=True,
        help="Build TensorRT engines too; for an existing BUNDLE, add them. May be given twice.",
    ),
    click.option(
        "--compute-capability",
        metavar="N,N",
        callback=_capabilities,
        help="GPUs of a tensorrt-rtx build, such as 86,89,120.  [default: all from 80]",
    ),
    click.option("--hardware-compatible", is_flag=True, help="tensorrt: engines run on Ampere GPUs and newer ones."),
    click.option("--version-compatible", is_flag=True, help="tensorrt: engines run in this version and newer ones."),
    click.option(
        "--timing-cache",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="tensorrt: timings to read, and to add to.",
    ),
    click.option(
        "--workspace", type=click.IntRange(1, 1 << 20), metavar="MIB", help="Memory that a layer may use while it runs."
    ),
    click.option(
        "--builder-optimization-level",
        type=click.IntRange(0, 5),
        metavar="N",
        help="How long the builder searches for faster kernels.",
    ),
    click.option(
        "--max-batch",
        type=click.IntRange(1, MOST_BATCH),
        metavar="N",
        default=32,
        show_default=True,
        help="Images of a batch at most.",
    ),
    click.option(
        "--jobs", type=click.IntRange(1, 64), metavar="N", default=1, show_default=True, help="Engines built at once."
    ),
    click.option(
        "--strip-weights", is_flag=True, help="Leave weights out of engines; loading takes them from the BUNDLE."
    ),
    click.option(
        "--conditional",
        is_flag=True,
        help="Build the parts of blocks too: a batch can then skip a sub-layer on the GPU.",
    ),
    click.option(
        "--leave-out-heads",
        is_flag=True,
        help="Build blocks a second time, without heads that calibration images hardly ever keep; needs statistics.",
    ),
)


def build_options(command: F) -> F:
    """Adds the options of a build to a command; they are the fields of `BuildOptions`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
