"""The images of a run that `adavit-run --draw` draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adavit.bundle.policy import Policy
from adavit.drawing.draw import draw
from adavit.files import write_beside
from adavit.results import Result

__all__ = ["Sample"]

IMAGES = 8
"""How many are drawn."""


class Sample:
    """The first images of a run, and what they kept, until they are drawn."""

    def __init__(self) -> None:
        self.images: list[npt.NDArray[np.float32]] = []
        self.results: list[Result] = []

    def add(self, images: npt.NDArray[np.float32], result: Result) -> None:
        """Takes of a batch, float32 [B, 3, S, S], what there is room for."""
        rows = slice(IMAGES - sum(map(len, self.images)))
        if rows.stop:
            self.images.append(images[rows].copy())  # not the batch
            self.results.append(result[rows])

    def save(self, path: Path, labels: Sequence[str]) -> None:
        """Writes their picture to `path` (PNG), beside it first, then renamed.

        Raises:
            OSError: no file can be written there.
        """
        logits = np.concatenate([result.logits for result in self.results])
        policy = Policy.concatenate([result.policy for result in self.results])
        result = Result(logits, policy, self.results[0].architecture, self.results[0].preprocessor)
        picture = draw(result, np.concatenate(self.images), labels)
        with write_beside(path.resolve()) as file:
            picture.save(file, "PNG", optimize=True)
