"""Pictures as the model saw them: cropped, and normalised or back in [0, 255]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.preprocessing import ImageLike, Preprocessor, decode, pictures_of
from adavit.errors import InputError

__all__ = ["crops", "normalised"]

Float = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


def normalised(images: Iterable[ImageLike] | ImageLike | Float, preprocessor: Preprocessor, most: int) -> Float:
    """Images as `Runtime.run` takes them: float32 [B, 3, S, S].

    Args:
        images: such an array, which is returned as it is, or what `Runtime.predict` takes.
        preprocessor: crops and normalises pictures.
        most: how many images there may be.

    Raises:
        InputError: there is no image or too many, or one cannot be read.
    """
    if _is_normalised(images):
        found: Any = images
        if found.ndim and len(found) > most:
            raise _too_many(most)
        return found  # type: ignore[no-any-return]
    pictures = _pictures(images, most + 1)
    if not pictures:
        raise InputError("images is empty: expected at least one image")
    if len(pictures) > most:
        raise _too_many(most)
    return np.stack([preprocessor(picture) for picture in pictures])


def crops(images: Iterable[ImageLike] | ImageLike | Float, preprocessor: Preprocessor, count: int) -> Iterator[Pixels]:
    """What the model saw of each of `count` images, uint8 [S, S, 3]; images as of `normalised`.

    Raises:
        InputError: there are not `count` images, or one cannot be read or is of another shape.
    """
    if _is_normalised(images):
        arrays: Any = images
        side = preprocessor.side
        if arrays.dtype != np.float32 or arrays.shape != (count, 3, side, side):
            raise InputError(
                f"images is {arrays.dtype} {list(arrays.shape)}: this result is of float32 [{count}, 3, {side}, {side}]"
            )
        for array in arrays:
            yield _denormalised(array, preprocessor)
        return
    pictures = _pictures(images, count + 1)
    if len(pictures) != count:
        found = f"more than {count}" if len(pictures) > count else len(pictures)
        raise InputError(f"there are {found} images: the result is of {count}")
    yield from map(preprocessor.crop, pictures)


def _is_normalised(images: object) -> bool:
    """Whether images are meant for `Runtime.run`: an array of floats."""
    return isinstance(images, np.ndarray) and images.dtype.kind == "f"


def _pictures(images: Any, most: int) -> list[ImageLike]:
    """Pictures that a caller gave, one alone or at most so many."""
    if isinstance(images, np.ndarray):
        decode(images)  # says of several in one array how to give them
    return list(islice(pictures_of(images), most))


def _denormalised(array: Float, preprocessor: Preprocessor) -> Pixels:
    """Normalised pixels [3, S, S] as the picture [S, S, 3] that they were made of."""
    if not np.isfinite(array).all():
        raise InputError("images hold NaN or infinite values; check the preprocessing")
    mean, std = (np.asarray(values, np.float64) for values in (preprocessor.mean, preprocessor.std))
    return np.clip(np.rint((array.transpose(1, 2, 0) * std + mean) * 255), 0, 255).astype(np.uint8)


def _too_many(most: int) -> InputError:
    return InputError(f"there are more than {most} images: at most {most} are drawn, give fewer")
