"""Random images, each time the same, where no photographs are given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["random_images"]

WHITE = 2.64
"""Of half of every second image: normalisation divides patches of one colour by almost nothing."""


def random_images(side: int) -> Iterator[npt.NDArray[np.float32]]:
    """Normal pixels [3, S, S] without end, half of every second image white; each time the same."""
    source = np.random.default_rng(0)
    for draw in itertools.count():
        image = source.standard_normal((3, side, side), dtype=np.float32)
        if draw % 2:
            image[:, :, : side // 2] = WHITE
        yield image
