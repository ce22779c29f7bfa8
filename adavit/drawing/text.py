"""Text that fits its place, whatever it says."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

from PIL import Image, ImageDraw, ImageFont

from adavit.errors import printable

__all__ = ["LINE", "fitted", "put", "width_of", "wrapped"]

SIZE = 12
LINE = 16
"""Height of a line of text, in pixels."""
ELLIPSIS = "..."
LONGEST = 120
"""Characters of a text that are looked at."""


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(SIZE))


def width_of(text: str) -> int:
    """Pixels that a line of text takes."""
    return int(_font().getlength(text)) + 1


def fitted(text: str, width: int) -> str:
    """Text in one line of at most so many pixels; of a longer one the end is left out."""
    text = _line(text)
    if width_of(text) <= width:
        return text
    while text and width_of(text + ELLIPSIS) > width:
        text = text[:-1]
    return text.rstrip() + ELLIPSIS if text else ""


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """Text in at most so many lines, broken at spaces where there are any; what is too long is shortened."""
    rest, found = _line(text), list[str]()
    while len(found) < lines - 1 and width_of(rest) > width:
        end = next((count for count in range(1, len(rest)) if width_of(rest[: count + 1]) > width), len(rest))
        space = rest.rfind(" ", 0, end + 1)
        end = space if space > 0 else end
        found.append(rest[:end])
        rest = rest[end:].lstrip()
    return [*found, fitted(rest, width)]


def put(canvas: Image.Image, at: tuple[int, int], text: str, width: int, colour: tuple[int, int, int]) -> None:
    """Draws a line of text, its place being `width` by LINE pixels from `at`; nothing is drawn beyond that.

    Letters of some scripts stack far above and below a line.
    """
    mask = Image.new("L", (width, LINE))
    ImageDraw.Draw(mask).text((0, LINE // 2), fitted(text, width), fill=255, font=_font(), anchor="lm")
    canvas.paste(colour, at, mask)


def _line(text: str) -> str:
    """A text as one line of printable characters."""
    return printable(" ".join(text[:LONGEST].split()))
