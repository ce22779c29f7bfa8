"""What a run needs at its end, looked for before it begins."""

from __future__ import annotations

import os
import shutil
import warnings
from importlib import import_module
from pathlib import Path

from adavit.errors import one_line, raise_interrupt
from adavit.files import check_place
from adavit.training.errors import TrainingError

__all__ = ["check_output", "check_packages", "warn_of_full_disk"]

PARTS = {"matplotlib": "matplotlib.figure", "safetensors": "safetensors.torch"}
"""The module of a package that is used; the package itself may import where that does not."""


def check_packages(*names: str) -> None:
    """Imports packages that are needed only later.

    Raises:
        ModuleNotFoundError: one is not installed; the command names the extra that brings it.
        TrainingError: one is installed but cannot be imported.
    """
    for name in names:
        try:
            import_module(name)
            import_module(PARTS[name])
        except ImportError as error:
            raise_interrupt(error)
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise
            raise TrainingError(
                f"{name} is installed but cannot be imported ({one_line(error)}); install it again"
            ) from None


def check_output(folder: Path, files: tuple[str, ...], resume: bool) -> None:
    """Refuses an output folder that cannot be written, or that holds another run.

    Args:
        folder: need not exist yet.
        files: names of what the run will write into it.
        resume: whether the run there is to go on.

    Raises:
        TrainingError: it holds a run that is not resumed, or cannot be written.
        OSError: one of the files cannot be written; the message names it.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise TrainingError(f"{place}: is no folder that can be written to; choose another --output")
    if not folder.exists():
        return
    if not resume and any((folder / name).exists() for name in files):
        raise TrainingError(f"{folder}: holds a run; pass --resume to go on with it, or choose another --output")
    for name in files:
        check_place(folder / name)


def warn_of_full_disk(folder: Path, weights: int) -> None:
    """Warns where the disk has no space for the checkpoints of a model with so many bytes of weights.

    A checkpoint holds the weights, their average and two moments of each, and is written while the last is there.
    """
    needed, free = 2 * 4 * weights, shutil.disk_usage(folder).free
    if free < needed:
        warnings.warn(
            f"{folder}: {free / 1e6:,.0f} MB free, where checkpoints need about {needed / 1e6:,.0f} MB", stacklevel=2
        )
