"""Loading a bundle while another process replaces it: the files of two bundles do not go together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from adavit.errors import BundleError
from adavit.reading import path_of

__all__ = ["again_if_replaced"]

T = TypeVar("T")

TRIES = 10


def again_if_replaced(path: Any, load: Callable[[], T]) -> T:
    """What `load` returns; where it fails and the bundle at `path` is another one than before, it is called again.

    Raises:
        BundleError: `load` failed, and nobody replaced the bundle meanwhile.
        InputError: `path` is no path.
    """
    for _ in range(TRIES):
        before = _identity(path)
        try:
            return load()
        except BundleError:
            if _identity(path) == before:
                raise
    return load()


def _identity(path: Any) -> tuple[int, ...] | None:
    """Tells a bundle's folder and description from others at its path; None where there is none."""
    place = path_of(path, "bundle")
    try:
        folder, config = os.stat(place), os.stat(place / "config.json")
    except OSError:
        return None
    return folder.st_dev, folder.st_ino, config.st_ino, config.st_mtime_ns
