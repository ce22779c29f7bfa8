"""The small marks of a block: filled for what ran, hollow for what did not. And how dropped patches are faded."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = ["ATTENTION", "HEAD", "MARK", "MLP", "faded", "mark"]

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

BLUE, VERMILLION = (0, 114, 178), (213, 94, 0)
"""Of Okabe and Ito's palette, which people with any colour vision tell apart."""
FADED = (200, 203, 208)
"""What dropped patches fade to: a grey unlike black and unlike white backgrounds."""
SHARE = 0.8
"""How far they do."""
MARK = 10
"""Side of a mark in pixels."""
SHARP = 8
"""Marks are drawn at so many times their size, for smooth edges."""

HEAD, ATTENTION, MLP = "dot", "square", "triangle"


def faded(pixels: Pixels) -> Pixels:
    """Pixels [..., 3] as dropped patches look."""
    mixed = (1 - SHARE) * pixels + SHARE * np.asarray(FADED)
    return np.rint(mixed).astype(np.uint8)


@lru_cache
def mark(shape: str, filled: bool) -> tuple[Image.Image, Colour]:
    """The mask, MARK by MARK pixels, and the colour of a head (dot), attention (square) or an MLP (triangle)."""
    side = MARK * SHARP
    mask = Image.new("L", (side, side))
    _shape(ImageDraw.Draw(mask), shape, side, 0, 255)
    if not filled:
        _shape(ImageDraw.Draw(mask), shape, side, 1.3 * SHARP, 0)
    colour = VERMILLION if shape == MLP else BLUE
    return mask.resize((MARK, MARK), Image.Resampling.BOX), colour


def _shape(draw: ImageDraw.ImageDraw, shape: str, side: int, line: float, ink: int) -> None:
    """Fills a shape that leaves `line` pixels at its edges."""
    if shape == HEAD:
        low, high = 1.5 * SHARP + line, side - 1.5 * SHARP - line
        draw.ellipse((low, low, high - 1, high - 1), ink)
    elif shape == ATTENTION:
        low, high = SHARP + line, side - SHARP - line
        draw.rectangle((low, low, high - 1, high - 1), ink)
    else:
        top, bottom = 0.5 * SHARP + 2.1 * line, side - SHARP - line
        left, right = 1.8 * line, side - 1.8 * line
        draw.polygon([(side / 2, top), (right, bottom), (left, bottom)], ink)
