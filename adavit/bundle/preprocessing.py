"""Images in: told apart from other things, decoded, and preprocessed as the bundle's model was trained."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from adavit.errors import BundleError, InputError, shown
from adavit.reading import open_regular, path_of

__all__ = ["ImageLike", "Preprocessor", "decode", "open_image", "pictures_of"]

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]

ONE = (str, os.PathLike, Image.Image, np.ndarray)
NONE = (bytes, bytearray, memoryview, Mapping, io.IOBase)
"""What is iterable and holds no pictures."""
HEIF = (".heic", ".heif", ".avif")
LONGEST = 64
"""Times its short side that a picture's long side may be."""
EXTREME = 1e6
"""Of a channel's mean and deviation: far beyond any of pixels in [0, 1], and far from what float32 cannot hold."""


@dataclass(frozen=True)
class Preprocessor:
    """Bicubic resize of the short side, centre crop, scale to [0, 1], normalise per channel.

    Attributes:
        side: side of the square result, in pixels.
        crop_ratio: the short side is resized to side / crop_ratio before the crop.
        mean, std: per channel, RGB.
    """

    side: int
    crop_ratio: float = 0.9
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def short_side(self) -> int:
        """Pixels the short side is resized to."""
        return int(self.side / self.crop_ratio)

    def __call__(self, image: ImageLike) -> npt.NDArray[np.float32]:
        """Turns a path, PIL image or uint8 array [H, W] or [H, W, 3] into float32 [3, side, side].

        Raises:
            InputError: the image cannot be read or is not an image.
        """
        return self.normalise(self.crop(image))

    def crop(self, image: ImageLike) -> npt.NDArray[np.uint8]:
        """Such an image resized and cropped, uint8 [side, side, 3]; see `__call__`."""
        picture = decode(image)
        width, height = picture.size
        short = min(width, height)
        size = self.short_side * width // short, self.short_side * height // short
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((length - self.side) / 2) for length in size)
        return np.asarray(picture.crop((left, top, left + self.side, top + self.side)))

    def normalise(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Pixels [S, S, 3] to float32 [3, S, S]."""
        scaled = pixels.astype(np.float32) / np.float32(255)
        normal = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))

    def to_dict(self) -> dict[str, Any]:
        """In the ecosystem's `preprocessor_config.json` layout."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.short_side},
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": True,
            "crop_size": {"height": self.side, "width": self.side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "crop_ratio": self.crop_ratio,
        }

    @classmethod
    def from_dict(cls, values: Any, side: int) -> Preprocessor:
        """Reads what `to_dict` wrote for a model of `side` pixels.

        Raises:
            BundleError: a value is missing or out of bounds.
        """
        try:
            mean, std = (tuple(float(v) for v in values[key]) for key in ("image_mean", "image_std"))
            result = cls(int(values["crop_size"]["height"]), float(values["crop_ratio"]), mean, std)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BundleError(f"preprocessor_config.json: {shown(error)} is missing or wrong; export again") from None
        if result.side != side or not 0.1 <= result.crop_ratio <= 1 or len(mean) != 3 or len(std) != 3:
            raise BundleError("preprocessor_config.json does not fit the model; export again")
        if not (all(abs(m) <= EXTREME for m in mean) and all(1 / EXTREME <= s <= EXTREME for s in std)):
            raise BundleError("preprocessor_config.json: mean or std is not usable; export again")
        if other := [key for key, value in result.to_dict().items() if values.get(key) != value]:
            raise BundleError(f"preprocessor_config.json: {other[0]} asks for what is not done here; export again")
        return result


def decode(image: ImageLike) -> Image.Image:
    """An upright RGB picture from a path, a PIL image or a uint8 array.

    Raises:
        InputError: it cannot be read, or is not an image.
    """
    if isinstance(image, str | os.PathLike):
        with open_image(path_of(image, "image")) as opened:
            return _rgb(opened)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
            several = "; give several as a list" if image.ndim == 4 else ""
            raise InputError(f"array {image.dtype} {list(image.shape)}: an image is uint8 [H, W] or [H, W, 3]{several}")
        image = Image.fromarray(np.asarray(image))
    if not isinstance(image, Image.Image):
        raise InputError(f"{shown(image)}: an image is a path, a PIL image or a uint8 array")
    with _named("image"):
        return _rgb(image)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file, to be decoded or verified meanwhile; what that raises is an InputError which names the file."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except OSError as error:
        raise InputError(f"{path}: not a readable image ({error.strerror})") from None
    with file, _named(path), warnings.catch_warnings():
        if not os.fstat(file.fileno()).st_size:
            raise InputError("not a readable image (it is empty)")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            yield opened


@contextmanager
def _named(name: str | Path) -> Iterator[None]:
    """Puts what is wrong with an image into one line; damaged ones raise anything, and not only when opened."""
    try:
        yield
    except MemoryError:
        raise
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(f"{name}: too many pixels to decode safely; make it smaller") from None
    except Exception as error:
        raise InputError(f"{name}: {_unreadable(name, error)}") from None


def _unreadable(name: str | Path, error: Exception) -> str:
    """What is wrong with an image that Pillow cannot decode."""
    if not isinstance(error, UnidentifiedImageError):
        return f"not a readable image ({type(error).__name__})"
    if Path(name).suffix.lower() in HEIF:
        return "not a readable image (Pillow does not read HEIF; convert it to JPEG, or register pillow-heif)"
    return "not a readable image (in no format that Pillow knows)"


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, upright; of 16-bit grey, which Pillow would clip at 255, the upper eight bits."""
    width, height = image.size
    if not min(width, height):
        raise InputError(f"{width}x{height} pixels is no picture")
    if max(width, height) > LONGEST * min(width, height):
        raise InputError(f"{width}x{height} pixels is too elongated; crop it first")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError("a picture of floating-point values has no known range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # "I" is what Pillow makes of 16 bits in some formats
        grey = np.asarray(image).astype(np.int64)
        if not 0 <= grey.min() <= grey.max() <= 0xFFFF:
            raise InputError("a picture with values beyond 16 bits has no known range; convert it to 8 or 16 bits")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    return image.convert("RGB")


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
