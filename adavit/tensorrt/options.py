"""What can be asked of a build, and which flavour of TensorRT can do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from adavit.errors import OptionError
from adavit.runtime.engine_sets import FLAVOURS

__all__ = ["BuildOptions", "build_options"]

F = TypeVar("F", bound=Callable[..., Any])

UNSUPPORTED = {
    "tensorrt": {
        "compute_capability": "it builds for the GPU it runs on; build on that machine, or add --hardware-compatible",
    },
    "tensorrt-rtx": {
        "hardware_compatible": "name the GPUs with --compute-capability",
        "version_compatible": "its engines are for the version that built them",
        "timing_cache": "its builder times no kernels",
    },
}
"""What a flavour cannot do, and why or what else does it."""


@dataclass(frozen=True)
class BuildOptions:
    """What `adavit-export --target` is asked for; see its --help."""

    target: tuple[str, ...] = ()
    compute_capability: tuple[int, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    timing_cache: Path | None = None
    workspace: int | None = None
    builder_optimization_level: int | None = None
    max_batch: int = 32
    jobs: int = 1
    strip_weights: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> BuildOptions:
        """Takes these fields out of a command's options, and checks them.

        Raises:
            OptionError: a target cannot do what is asked.
        """
        build = cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        build.check()
        return build

    def check(self) -> None:
        """Raises OptionError where a flavour cannot do what is asked, or no target is there to do it for."""
        if not self.target:
            if self != BuildOptions():
                raise OptionError("options for building TensorRT engines without a --target; add one")
            return
        if len(set(self.target)) < len(self.target):
            raise OptionError("a --target is there twice")
        for target in self.target:
            for option, why in UNSUPPORTED[target].items():
                if getattr(self, option):
                    raise OptionError(f"{target} has no --{option.replace('_', '-')}: {why}")


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
    click.option("--hardware-compatible", is_flag=True, help="tensorrt: engines run on this GPU and newer ones."),
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
        type=click.IntRange(1, 4096),
        metavar="N",
        default=32,
        show_default=True,
        help="Images that the dense twin runs at once; others run one by one.",
    ),
    click.option(
        "--jobs", type=click.IntRange(1, 64), metavar="N", default=1, show_default=True, help="Engines built at once."
    ),
    click.option(
        "--strip-weights", is_flag=True, help="Leave weights out of engines; loading takes them from the ONNX files."
    ),
)


def build_options(command: F) -> F:
    """Adds the options of a build to a command; they are the fields of `BuildOptions`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
