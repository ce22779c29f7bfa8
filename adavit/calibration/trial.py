"""Trying offsets out: what the runtime takes and gets right with them on the calibration images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.errors import InputError
from adavit.macs import dense_macs
from adavit.runtime.budget import TRAINED, Offsets
from adavit.runtime.image_files import find_calibration_images
from adavit.runtime.session import Runtime

__all__ = ["Outcome", "Trial"]

MOST_IMAGES = 2048
MOST_BYTES = 512 << 20
"""Of preprocessed images."""
FEWEST_IMAGES = 16
SEARCHED, SIZED = 1024, 128
"""Images that are enough to compare offsets, and to tell how far they move the MACs; each time the same."""
BATCH = 32

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Outcome:
    """What offsets did.

    Attributes:
        macs: mean share of the dense MACs.
        score: mean probability of the wanted class: the image's label, or else the trained policy's class. It
            follows accuracy or agreement, with less noise.
        agreement: share of images whose class is the trained policy's.
        accuracy: share of images whose class is their label, or None without labels.
        usage: mean share of tokens, heads and sub-layers kept.
        scores: of each image [n], where it is known.
    """

    macs: float
    score: float
    agreement: float
    accuracy: float | None
    usage: dict[str, float]
    scores: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    def doubt(self, other: Outcome) -> float:
        """The standard error of the difference in score between this outcome and another on the same images."""
        if self.scores is None or other.scores is None:
            return 0.0
        return float((self.scores - other.scores).std() / len(self.scores) ** 0.5)

    def to_dict(self) -> dict[str, Any]:
        """What an operating point stores."""
        known = {} if self.accuracy is None else {"accuracy": self.accuracy}
        return {"macs": self.macs, **known, "agreement": self.agreement, "usage": self.usage}


class Trial:
    """Images, and what is wanted of them.

    Args:
        runtime: what to try.
        images: float32 [n, 3, S, S], in random order.
        labels: their classes [n], or None.
        progress: told how much of a run is done.
    """

    def __init__(
        self, runtime: Runtime, images: npt.NDArray[np.float32], labels: npt.NDArray[np.intp] | None, progress: Progress
    ) -> None:
        self.runtime = runtime
        self.labels = labels
        self._images = images
        self._progress = progress
        self._done: dict[tuple[Offsets, int], Outcome] = {}
        self._classes: npt.NDArray[np.intp] | None = None
        self.trained = self.run(TRAINED)

    @classmethod
    def of_files(
        cls,
        runtime: Runtime,
        paths: tuple[Path, ...],
        progress: Progress,
        by_order: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> tuple[Trial, list[str]]:
        """The images at `paths`, a random part of them if they are many, and what could not be read.

        Their labels, by `by_order`, and what is noted are as of `find_calibration_images`.

        Raises:
            InputError: there are no images, or too few.
        """
        files = find_calibration_images(paths, runtime.labels, by_order, note)
        most = max(FEWEST_IMAGES, min(MOST_IMAGES, MOST_BYTES // (4 * 3 * runtime.architecture.image_size**2)))
        pixels, labels, skipped = [], [], []
        for position in np.random.default_rng(0).permutation(len(files)):
            try:
                pixels.append(runtime.preprocess(files[position].path))
            except InputError as error:
                skipped.append(str(error))
                continue
            labels.append(files[position].label)
            progress("reading images", len(pixels) / min(most, len(files)))
            if len(pixels) == most:
                break
        if len(pixels) < FEWEST_IMAGES:
            first = f"; first unreadable: {skipped[0]}" if skipped else ""
            raise InputError(f"budgets need at least {FEWEST_IMAGES} images, {len(pixels)} can be read{first}")
        known = None if None in labels else np.asarray(labels, np.intp)
        return cls(runtime, np.stack(pixels), known, progress), skipped

    def __len__(self) -> int:
        return len(self._images)

    def search(self, offsets: Offsets) -> Outcome:
        """The outcome on as many images as a comparison needs."""
        return self.run(offsets, min(SEARCHED, len(self)))

    def size(self, offsets: Offsets) -> Outcome:
        """The outcome on as many images as tell the MACs about."""
        return self.run(offsets, min(SIZED, len(self)))

    def run(self, offsets: Offsets, count: int | None = None) -> Outcome:
        """The outcome on the first `count` images, or all."""
        count = len(self) if count is None else count
        if (offsets, count) not in self._done:
            self._done[offsets, count] = self._run(offsets, count)
        return self._done[offsets, count]

    def _run(self, offsets: Offsets, count: int) -> Outcome:
        probabilities, macs, usage = [], [], []
        for start in range(0, count, BATCH):
            result = self.runtime.run(self._images[start : min(start + BATCH, count)], budget=offsets)
            scores = np.exp(result.logits - result.logits.max(1, keepdims=True), dtype=np.float64)
            probabilities.append(scores / scores.sum(1, keepdims=True))
            macs.append(result.macs)
            usage.append([(len(result.macs) * share) for share in result.policy.usage().values()])
            self._progress("trying operating points", min(1.0, (start + BATCH) / count))
        shares = np.concatenate(probabilities)
        classes = shares.argmax(1)
        if self._classes is None:  # the first run is of the trained policy, on all images
            self._classes = classes
        wanted = (self._classes if self.labels is None else self.labels)[:count]
        scored = shares[np.arange(count), wanted]
        return Outcome(
            float(np.concatenate(macs).mean() / dense_macs(self.runtime.architecture)),
            float(scored.mean()),
            float((classes == self._classes[:count]).mean()),
            None if self.labels is None else float((classes == wanted).mean()),
            dict(zip(("tokens", "heads", "sublayers"), (np.sum(usage, axis=0) / count).tolist(), strict=True)),
            scored,
        )
