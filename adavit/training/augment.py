"""The training views of images, each draw a function of seed and step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from adavit.bundle.preprocessing import Preprocessor
from adavit.training.data import Pixels

__all__ = ["AUGMENTATIONS", "Augment", "Draw", "usual_crop"]

AUGMENTATIONS = ("none", "shift", "crop")
SMALL_SIDE = 64
SHIFT = 14  # An image is shifted by up to 1/14 of its side: 2 pixels of 28.
AREA, RATIO = (0.25, 1.0), (3 / 4, 4 / 3)


def usual_crop(side: int) -> float:
    """Share of the short side that evaluation keeps: everything of a small image, the usual 0.9 of a photograph."""
    return 1.0 if side <= SMALL_SIDE else Preprocessor.crop_ratio


@dataclass(frozen=True)
class Draw:
    """What chance decides for one image: four numbers in [0, 1) and whether to mirror."""

    numbers: npt.NDArray[np.float64]
    mirror: bool


@dataclass(frozen=True)
class Augment:
    """The training view of an image.

    Attributes:
        kind: "none", "shift" (small images: moved by up to 1/14 of the side, black beyond the border) or "crop"
            (photographs: a random area resized).
        side: of the result.
        crop: as in evaluation.
        mirror: half the images are mirrored.
    """

    kind: str
    side: int
    crop: float
    mirror: bool

    def draws(self, seed: int, step: int, batch: int) -> list[Draw]:
        """The draws of one global batch, the same for any number of processes."""
        generator = np.random.default_rng([seed, step])
        numbers, mirrors = generator.random((batch, 4)), generator.random(batch) < 0.5
        return [Draw(row, self.mirror and bool(mirror)) for row, mirror in zip(numbers, mirrors, strict=True)]

    def __call__(self, pixels: Pixels, draw: Draw) -> Pixels:
        """uint8 [height, width, 3] to [side, side, 3]."""
        if self.kind == "crop":
            pixels = _random_crop(pixels, self.side, draw)
        else:
            pixels = Preprocessor(self.side, self.crop).crop(pixels)
        if self.kind == "shift":
            pixels = _shift(pixels, draw)
        return pixels[:, ::-1] if draw.mirror else pixels


def _shift(pixels: Pixels, draw: Draw) -> Pixels:
    side = pixels.shape[0]
    reach = max(1, side // SHIFT)
    top, left = (int(number * (2 * reach + 1)) for number in draw.numbers[:2])
    return np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)))[top : top + side, left : left + side]


def _random_crop(pixels: Pixels, side: int, draw: Draw) -> Pixels:
    height, width = pixels.shape[:2]
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * draw.numbers[2])
    ratio = np.exp(np.interp(draw.numbers[3], (0, 1), np.log(RATIO)))
    box_width = int(np.clip(round((area * ratio) ** 0.5), 1, width))
    box_height = int(np.clip(round((area / ratio) ** 0.5), 1, height))
    left, top = int(draw.numbers[0] * (width - box_width + 1)), int(draw.numbers[1] * (height - box_height + 1))
    box = left, top, left + box_width, top + box_height
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC, box))
