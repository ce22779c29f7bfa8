"""How public functions read what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from adavit.arguments import each, plain
from adavit.errors import AdaViTError, OptionError, missing_package, shown
from adavit.reading import path_of

__all__ = [
    "Place",
    "Places",
    "Progress",
    "images_given",
    "installed",
    "model_given",
    "path_of_option",
    "paths_of",
    "told_of",
]

Place = str | PathLike[str]
Places = Place | Iterable[Place]
Progress = Callable[[str, float], None]


@contextmanager
def installed() -> Iterator[None]:
    """Raises AdaViTError, which says what to install, where an optional package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        hint = missing_package(error)
        if hint is None:
            raise
        raise AdaViTError(hint) from None


def told_of(progress: object) -> Progress:
    """What is told of progress: a caller's function, or nothing."""
    if progress is None:
        return lambda stage, share: None
    if not callable(progress):
        raise OptionError(f"progress is {shown(progress)}: expected a function of a stage and a share")
    return progress


def path_of_option(name: str, value: Place | None) -> Path | None:
    """The path that an option was given, if any."""
    return None if value is None else path_of(value, name)


def paths_of(name: str, value: object) -> tuple[Path, ...]:
    """One path, or those of an iterable."""
    found = each(name, value, "a path, or a sequence of paths", str, PathLike)
    return tuple(path_of(path, name) for path in found)


def images_given(calibration_images: object, labels_by_order: object) -> dict[str, Any]:
    """The options of calibration images."""
    return {
        "calibration_images": paths_of("calibration_images", calibration_images),
        "labels_by_order": plain(labels_by_order),
    }


def model_given(
    labels: Place | None, image_size: object, crop_ratio: object, mean: object, std: object, heads: object
) -> dict[str, Any]:
    """The options that say what a checkpoint does not tell."""
    channels = {
        name: None if value is None else each(name, value, "three numbers, of red, green and blue")
        for name, value in (("mean", mean), ("std", std))
    }
    return {
        "labels": path_of_option("labels", labels),
        "image_size": plain(image_size),
        "crop_ratio": plain(crop_ratio),
        "heads": plain(heads),
        **channels,
    }
