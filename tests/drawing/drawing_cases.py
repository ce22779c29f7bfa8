"""Results that were never run, and where their pictures have what."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import random_images, random_policy, tiny
from PIL import Image

from adavit.architecture import Architecture
from adavit.bundle.preprocessing import Preprocessor
from adavit.drawing.sheet import Sheet
from adavit.runtime import Policy, Result


def result_of(policy: Policy, arch: Architecture, seed: int = 0) -> Result:
    """A result with random logits."""
    logits = np.random.default_rng(seed).standard_normal((len(policy), arch.classes), dtype=np.float32)
    return Result(logits, policy, arch, Preprocessor(arch.image_size))


def some(count: int = 3, seed: int = 0, **shapes: Any) -> tuple[Result, np.ndarray]:
    """A result of a random policy, and its images, float32 [B, 3, S, S]."""
    arch = tiny(**shapes)
    return result_of(random_policy(arch, count, seed), arch, seed), random_images(arch, count)


def thumbnail(picture: Image.Image, result: Result, row: int, block: int) -> np.ndarray:
    """The patches of a block's thumbnail, [G, G, cell, cell, 3]; block -1 is the image itself."""
    sheet, grid = Sheet(result.architecture, len(result.policy)), result.architecture.grid
    left, top = sheet.left(block) - 6 * (block < 0), sheet.top(row)
    pixels = np.asarray(picture.crop((left, top, left + sheet.thumb, top + sheet.thumb)))
    return pixels.reshape(grid, sheet.cell, grid, sheet.cell, 3).swapaxes(1, 2)


def below(picture: Image.Image, result: Result, row: int, block: int) -> np.ndarray:
    """What is painted below a block's thumbnail, bool [height, width]."""
    sheet = Sheet(result.architecture, len(result.policy))
    left, top = sheet.left(block), sheet.top(row) + sheet.thumb + 2
    box = left - 1, top, left - 1 + sheet.column, sheet.top(row + 1) - 2
    return (np.asarray(picture.crop(box)) < 250).any(-1)
