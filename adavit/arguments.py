"""What callers hand to a runtime, told apart from what they meant to."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from operator import index
from typing import Any

import numpy as np
from PIL import Image

from adavit.bundle.preprocessing import ImageLike
from adavit.errors import InputError, shown

__all__ = ["pictures_of", "whole"]

ONE = (str, os.PathLike, Image.Image, np.ndarray)
NONE = (bytes, bytearray, memoryview, Mapping, io.IOBase)
"""What is iterable and holds no pictures."""


def pictures_of(given: Any) -> Iterator[ImageLike]:
    """The pictures of an iterable, or one alone.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, ONE):
        return iter([given])
    if not isinstance(given, NONE):
        with suppress(TypeError):
            return iter(given)
    raise InputError(
        f"images is {shown(given)}: expected a path, a PIL image, a uint8 array [H, W] or [H, W, 3], "
        "or an iterable of these"
    )


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number that a caller gave, Python's or numpy's.

    Raises:
        InputError: it is none, or out of bounds.
    """
    if not isinstance(value, bool | np.bool_ | np.ndarray):
        try:
            found = index(value)
        except Exception:  # TypeError of what is no number, and a foreign __index__ raises anything
            pass
        else:
            if least <= found and (most is None or found <= most):
                return found
    bounds = f"from {least} on" if most is None else f"from {least} to {most}"
    raise InputError(f"{name} is {shown(value)}: expected a whole number {bounds}")
