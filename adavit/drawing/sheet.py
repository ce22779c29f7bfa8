"""Where everything stands in the picture: a header, a row for each image, and a legend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from adavit.architecture import Architecture
from adavit.bundle.policy import Policy
from adavit.drawing import marks, text
from adavit.errors import InputError

__all__ = ["Sheet"]

Pixels = npt.NDArray[np.uint8]

MARGIN, GAP, ROW_GAP = 14, 6, 14
CAPTION = 122
"""Width of the captions, in pixels."""
LARGE, SMALL = 70, 56
"""About the sides of the thumbnails of up to FEW blocks, and of more."""
FEW = 9
HEAD_STEP = 8
SWATCH = 14
LEGEND_GAP = 20
MOST_PIXELS = 64_000_000

BAR = 6
"""Height of the bar of MACs."""
PAPER, LIGHT, GREY, INK = (255, 255, 255), (218, 221, 226), (95, 95, 95), (30, 30, 30)


@dataclass(frozen=True)
class Sheet:
    """The layout for `rows` images of a model, and how each part is painted.

    Attributes:
        arch: the model's shapes.
        rows: how many images there are.
    """

    arch: Architecture
    rows: int

    @cached_property
    def cell(self) -> int:
        """Pixels a side of a patch in the thumbnails."""
        return max(1, round((LARGE if self.arch.depth <= FEW else SMALL) / self.arch.grid))

    @cached_property
    def thumb(self) -> int:
        """Side of a thumbnail."""
        return self.cell * self.arch.grid

    @cached_property
    def column(self) -> int:
        """From one block to the next; two marks and a number of four digits have room in it."""
        return max(self.thumb, 4 * marks.MARK) + GAP

    @cached_property
    def head_lines(self) -> int:
        """Lines of dots that a block's heads take."""
        return math.ceil(self.arch.heads / ((self.column - GAP) // HEAD_STEP))

    @cached_property
    def heads_per_line(self) -> int:
        """Dots in each of them but the last."""
        return math.ceil(self.arch.heads / self.head_lines)

    @cached_property
    def beside(self) -> bool:
        """Whether the marks of the sub-layers stand beside the dots, at the right; else below them."""
        taken = self.heads_per_line * HEAD_STEP + 2 * marks.MARK + GAP
        return self.head_lines == 1 and taken <= self.column - GAP

    @cached_property
    def mark_top(self) -> int:
        """Pixels from the first line of dots down to the marks."""
        return 0 if self.beside else self.head_lines * marks.MARK + 2

    @cached_property
    def row(self) -> int:
        """Height of a row with the gap below it."""
        cell = self.thumb + 4 + self.mark_top + marks.MARK
        return max(cell, 5 * text.LINE) + ROW_GAP

    @cached_property
    def width(self) -> int:
        """Of the picture."""
        return self.left(self.arch.depth) - GAP + MARGIN

    @cached_property
    def height(self) -> int:
        """Of the picture."""
        return self.top(self.rows) + len(self._legend()) * (text.LINE + 4) + MARGIN

    def left(self, block: int) -> int:
        """Where a block's column begins; the image's own is before that of block 0."""
        return MARGIN + CAPTION + GAP + self.column + GAP + block * self.column

    def top(self, row: int) -> int:
        """Where a row begins."""
        return MARGIN + text.LINE + 4 + row * self.row

    def blank(self) -> Image.Image:
        """The paper with its header and legend; raises InputError where it would be too large."""
        if self.width * self.height > MOST_PIXELS:
            raise InputError(
                f"{self.rows} images of this model make a picture of {self.width}x{self.height} pixels, "
                f"the most is {MOST_PIXELS // 10**6} million; give fewer images"
            )
        canvas = Image.new("RGB", (self.width, self.height), PAPER)
        text.put(canvas, (self.left(-1) - GAP, MARGIN), "image", self.column - GAP, GREY)
        for block in range(self.arch.depth):
            name = f"block {block}"
            name = name if text.width_of(name) <= self.column - GAP else str(block)
            text.put(canvas, (self.left(block), MARGIN), name, self.column - GAP, GREY)
        self._paint_legend(canvas)
        return canvas

    def paint_caption(self, canvas: Image.Image, row: int, label: str, facts: list[str]) -> None:
        """Writes what an image was taken for, and lines of facts below that."""
        lines = [(line, INK) for line in text.wrapped(label, CAPTION - GAP, 2)] + [(fact, GREY) for fact in facts]
        for number, (line, colour) in enumerate(lines):
            text.put(canvas, (MARGIN, self.top(row) - 2 + number * text.LINE), line, CAPTION - GAP, colour)

    def paint_row(self, canvas: Image.Image, row: int, pixels: Pixels, policy: Policy, share: float) -> None:
        """Paints an image and its blocks.

        Args:
            canvas: what `blank` made.
            row: which.
            pixels: the image as the model saw it, uint8 [S, S, 3].
            policy: what it used, of this image alone.
            share: of the dense MACs.
        """
        top, size = self.top(row), (self.thumb, self.thumb)
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        canvas.paste(picture, (self.left(-1) - GAP, top))
        _paint_bar(canvas, (self.left(-1) - GAP, top + self.thumb + 6), self.thumb, share)
        plain = np.asarray(picture)
        dim = marks.faded(plain)
        used = policy.executed()
        for block in range(self.arch.depth):
            kept = used.tokens[0, block, 1:].reshape(self.arch.grid, self.arch.grid)
            shown = kept.repeat(self.cell, 0).repeat(self.cell, 1)[..., None]
            canvas.paste(Image.fromarray(np.where(shown, plain, dim)), (self.left(block), top))
            self._paint_marks(canvas, block, top + self.thumb + 4, used)

    def _paint_marks(self, canvas: Image.Image, block: int, top: int, used: Policy) -> None:
        """A dot for each head, then attention's mark and the MLP's."""
        left = self.left(block) - 1  # marks have an edge of their own
        for head, on in enumerate(used.heads[0, block]):
            line, place = divmod(head, self.heads_per_line)
            _paint_mark(canvas, (left + place * HEAD_STEP, top + line * marks.MARK), marks.HEAD, bool(on))
        left += self.beside * (self.column - GAP - 2 * marks.MARK)
        for place, (shape, on) in enumerate(zip((marks.ATTENTION, marks.MLP), used.sublayers[0, block], strict=True)):
            _paint_mark(canvas, (left + place * (marks.MARK + 1), top + self.mark_top), shape, bool(on))

    def _legend(self) -> list[list[tuple[str, str]]]:
        """Entries of the legend, (what is shown, what it means), by line."""
        entries = [
            ("patches", "patch kept / dropped"),
            (marks.HEAD, "head used / not"),
            (marks.ATTENTION, "attention ran / skipped"),
            (marks.MLP, "MLP ran / skipped"),
            ("bar", "MACs / dense MACs"),
        ]
        lines: list[list[tuple[str, str]]] = [[]]
        room = self.width - 2 * MARGIN
        for entry in entries:
            taken = sum(map(_entry_width, (*lines[-1], entry))) - LEGEND_GAP
            if lines[-1] and taken > room:
                lines.append([])
            lines[-1].append(entry)
        return lines

    def _paint_legend(self, canvas: Image.Image) -> None:
        for number, line in enumerate(self._legend()):
            left, top = MARGIN, self.top(self.rows) + number * (text.LINE + 4)
            for shape, meaning in line:
                _paint_sample(canvas, (left, top + 1), shape)
                text.put(canvas, (left + 2 * SWATCH + 8, top), meaning, text.width_of(meaning), GREY)
                left += _entry_width((shape, meaning))


def _entry_width(entry: tuple[str, str]) -> int:
    """Pixels that an entry of the legend takes with the gap behind it."""
    return 2 * SWATCH + 8 + text.width_of(entry[1]) + LEGEND_GAP


def _paint_sample(canvas: Image.Image, at: tuple[int, int], shape: str) -> None:
    """An entry's two looks, for yes and for no, 2 SWATCH wide."""
    left, top = at
    if shape == "bar":
        _paint_bar(canvas, (left, top + 4), 2 * SWATCH, 0.4)
        return
    for place, on in enumerate((True, False)):
        if shape == "patches":
            canvas.paste(_swatch(on), (left + place * (SWATCH + 2), top))
        else:
            _paint_mark(canvas, (left + place * (SWATCH + 2) + 2, top + 2), shape, on)


def _swatch(kept: bool) -> Image.Image:
    """What a kept or a dropped patch looks like."""
    ramp = np.linspace(20, 235, SWATCH).astype(np.uint8)
    pixels = np.broadcast_to(ramp[:, None, None], (SWATCH, SWATCH, 3))
    return Image.fromarray(pixels if kept else marks.faded(pixels))


def _paint_mark(canvas: Image.Image, at: tuple[int, int], shape: str, filled: bool) -> None:
    mask, colour = marks.mark(shape, filled)
    canvas.paste(colour, at, mask)


def _paint_bar(canvas: Image.Image, at: tuple[int, int], length: int, share: float) -> None:
    """A bar that is dark for a share of its length."""
    left, top = at
    canvas.paste(LIGHT, (left, top, left + length, top + BAR))
    canvas.paste(GREY, (left, top, left + round(length * share), top + BAR))
