"""What a caller gives to be run, checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.errors import InputError, shown

__all__ = ["checked_images"]

Float = npt.NDArray[np.float32]
LARGEST = 1e15
"""Of an image's values: far beyond any pixel, and products with weights stay within what a layer norm bears."""


def checked_images(images: Any, side: int) -> Float:
    """Images as every backend takes them, float32 [B, 3, side, side] in C order.

    Raises:
        InputError: they are of another shape or type, or have values that are not finite or beyond LARGEST.
    """
    if isinstance(images, np.ndarray):
        images = np.asarray(images)
    wanted = f"float32 [B, 3, {side}, {side}] with B >= 1"
    if not isinstance(images, np.ndarray):
        raise InputError(f"images is a {type(images).__name__}, {shown(images)}: expected a numpy array, {wanted}")
    if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != (3, side, side) or not len(images):
        raise InputError(f"images is {images.dtype} {list(images.shape)}: expected {wanted}")
    largest = max(float(images.max()), -float(images.min()))  # NaN where there is one: it is both
    if not math.isfinite(largest):
        raise InputError("images hold NaN or infinite values; check the preprocessing")
    if largest > LARGEST:
        raise InputError(f"images hold values of {largest:.0e}; normalised pixels are below 10, see preprocess")
    return np.require(images, requirements=["C", "W"])  # OpenVINO takes no memory that is read-only
