"""Trying offsets out: what the runtime takes and gets right with them on the calibration images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.calibration.decisions import Decisions
from adavit.calibration.options import DEFAULT_IMAGES, FEWEST_IMAGES
from adavit.calibration.search_progress import SearchProgress
from adavit.datasets.image_files import find_calibration_images
from adavit.errors import InputError
from adavit.macs import dense_macs
from adavit.measure.compare import KINDS, ObservedRuntime
from adavit.results import Result
from adavit.runtime.session import Runtime

__all__ = ["OffsetEvaluator", "Outcome"]

MOST_BYTES = 512 << 20
"""Of preprocessed images."""
SPECIALISING = 64
"""Images whose policies get engines of their own, since the search runs many times as many."""
BATCH, RECORDED = 32, 8
"""Images that run at once, and while their decisions are recorded, which keeps what every block is given."""

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
        usage: mean share of tokens, heads and sub-layers that ran; see `Policy.usage`.
        scores: of each image [n], where it is known.
    """

    macs: float
    score: float
    agreement: float
    accuracy: float | None
    usage: dict[str, float]
    scores: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    def standard_error(self, other: Outcome) -> float:
        """The standard error of the difference in score between this outcome and another on the same images."""
        if self.scores is None or other.scores is None:
            return 0.0
        return float((self.scores - other.scores).std() / len(self.scores) ** 0.5)

    def to_dict(self) -> dict[str, Any]:
        """What an operating point stores."""
        known = {} if self.accuracy is None else {"accuracy": self.accuracy}
        return {"macs": self.macs, **known, "agreement": self.agreement, "usage": self.usage}


class Runs(NamedTuple):
    """What the first n images did: class probabilities [n, C], MACs [n], and usage by kind [n, 3]."""

    probabilities: npt.NDArray[np.float64]
    macs: npt.NDArray[np.int64]
    usage: npt.NDArray[np.float64]


class OffsetEvaluator:
    """Images, and what is wanted of them.

    Args:
        runtime: what to try.
        images: float32 [n, 3, S, S], in random order.
        labels: their classes [n], or None.

    Attributes:
        images: as given.
        progress: counts the images that run.
    """

    def __init__(
        self,
        runtime: Runtime,
        images: npt.NDArray[np.float32],
        labels: npt.NDArray[np.intp] | None,
    ) -> None:
        self.runtime = runtime
        self.labels = labels
        self.progress = SearchProgress(lambda _: None)
        self.images = images
        self._runs: dict[Offsets, Runs] = {}
        self._recorded: Decisions | None = None

    @classmethod
    def of_files(
        cls,
        runtime: Runtime,
        paths: tuple[Path, ...],
        progress: Progress,
        most: int = DEFAULT_IMAGES,
        by_order: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> tuple[OffsetEvaluator, list[str]]:
        """The images at `paths`, a random part of them if they are more than `most`, and what could not be read.

        Their labels, by `by_order`, and what is noted are as of `find_calibration_images`.

        Raises:
            InputError: there are no images, or too few.
        """
        files = find_calibration_images(paths, runtime.labels, by_order, note)
        held = MOST_BYTES // (4 * 3 * runtime.architecture.image_size**2)
        most = min(most, len(files), max(FEWEST_IMAGES, held))
        pixels, labels, skipped = [], [], []
        for position in np.random.default_rng(0).permutation(len(files)):
            try:
                pixels.append(runtime.preprocess(files[position].path))
            except InputError as error:
                skipped.append(str(error))
                continue
            labels.append(files[position].label)
            progress("reading images", len(pixels) / most)
            if len(pixels) == most:
                break
        if len(pixels) < FEWEST_IMAGES:
            first = f"; first unreadable: {skipped[0]}" if skipped else ""
            raise InputError(f"budgets need at least {FEWEST_IMAGES} images, {len(pixels)} can be read{first}")
        known = None if None in labels else np.asarray(labels, np.intp)
        runtime.specialise(runtime.run(np.stack(pixels[:SPECIALISING])).policy)  # faster from here on
        return cls(runtime, np.stack(pixels), known), skipped

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def trained(self) -> Outcome:
        """What the trained policy does on all images."""
        return self.run(TRAINED)

    def record(self, offsets: Offsets, count: int) -> Decisions:
        """The decision logits of the first `count` images; those recorded last are kept."""
        count = min(count, len(self))
        if self._recorded is None or (self._recorded.offsets, len(self._recorded)) != (offsets, count):
            runs, margins = [], []
            for start in range(0, count, RECORDED):
                result, found = self._observed.run(self.images[start : min(start + RECORDED, count)], budget=offsets)
                runs.append(_runs_of(result))
                margins += found
                self.progress.ran(len(found))
            if offsets not in self._runs:
                self._runs[offsets] = _joined(runs)
            self._recorded = Decisions.of(self.runtime.architecture, offsets, margins)
        return self._recorded

    def run(self, offsets: Offsets, count: int | None = None, like: Decisions | None = None) -> Outcome:
        """The outcome on the first `count` images, or all.

        Args:
            offsets: what to run with.
            count: how many images.
            like: recorded decisions of these images; those for which nothing changes do not run again.
        """
        return self._outcome(self._first(offsets, len(self) if count is None else min(count, len(self)), like))

    @cached_property
    def _observed(self) -> ObservedRuntime:
        return ObservedRuntime(self.runtime)

    @cached_property
    def _classes(self) -> npt.NDArray[np.intp]:
        """Those the trained policy finds."""
        found: npt.NDArray[np.intp] = self._first(TRAINED, len(self)).probabilities.argmax(1)
        return found

    def _first(self, offsets: Offsets, count: int, like: Decisions | None = None) -> Runs:
        """What the first images do, run as far as it is not known."""
        known = self._runs.get(offsets)
        have = 0 if known is None else len(known.macs)
        if known is None or have < count:
            rows = np.arange(have, count)
            more = self._run(offsets, rows) if like is None else self._changed(offsets, rows, like)
            known = more if known is None else _joined([known, more])
        self._runs[offsets] = known
        return Runs(known.probabilities[:count], known.macs[:count], known.usage[:count])

    def _changed(self, offsets: Offsets, rows: npt.NDArray[np.intp], like: Decisions) -> Runs:
        """What some of the recorded images do, which run only where their decisions change."""
        before = self._first(like.offsets, len(like))
        runs = Runs(before.probabilities[rows], before.macs[rows], before.usage[rows])
        changed = like.changed(offsets)[rows]
        if changed.any():
            for values, new in zip(runs, self._run(offsets, rows[changed]), strict=True):
                values[changed] = new
        return runs

    def _run(self, offsets: Offsets, chosen: npt.NDArray[np.intp]) -> Runs:
        """What some images do."""
        runs = []
        for start in range(0, len(chosen), BATCH):
            rows = chosen[start : start + BATCH]
            runs.append(_runs_of(self.runtime.run(self.images[rows], budget=offsets)))
            self.progress.ran(len(rows))
        return _joined(runs)

    def _outcome(self, runs: Runs) -> Outcome:
        count, classes, trained = len(runs.macs), runs.probabilities.argmax(1), self._classes
        wanted = (trained if self.labels is None else self.labels)[:count]
        scores = runs.probabilities[np.arange(count), wanted]
        return Outcome(
            float(runs.macs.mean() / dense_macs(self.runtime.architecture)),
            float(scores.mean()),
            float((classes == trained[:count]).mean()),
            None if self.labels is None else float((classes == wanted).mean()),
            dict(zip(KINDS, runs.usage.mean(0).tolist(), strict=True)),
            scores,
        )


def _runs_of(result: Result) -> Runs:
    scores = np.exp(result.logits - result.logits.max(1, keepdims=True), dtype=np.float64)
    usage = [mask.mean((1, 2)) for mask in result.policy.executed().masks()]
    return Runs(scores / scores.sum(1, keepdims=True), result.macs, np.stack(usage, 1))


def _joined(runs: Sequence[Runs]) -> Runs:
    probabilities, macs, usage = zip(*runs, strict=True)
    return Runs(np.concatenate(probabilities), np.concatenate(macs), np.concatenate(usage))
