"""Mixed precision: as much in int8 as keeps the accuracy within bounds, the most sensitive sub-layers in fp16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.calibration.convert import Assigned, Assignment
from adavit.calibration.linear import Sublayer
from adavit.errors import InputError
from adavit.runtime.finite import NotFiniteError
from adavit.runtime.session import Runtime

__all__ = ["MOST_IMAGES", "Measure", "Search"]

SENSITIVITY_IMAGES = 64
"""Images that each sub-layer's sensitivity is measured on."""
MOST_IMAGES = 512
"""Images that the drop is measured on."""

Float = npt.NDArray[np.float32]
OVERFLOW_ERROR = float(np.finfo(np.float32).max)
"""Stands for the error of logits that are not finite."""
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Loss:
    """What a precision costs against fp32 on the same images.

    Attributes:
        drop: points of accuracy where images have labels, else of agreement with fp32's classes.
        agreement: share of images of the same class.
        logit_error: mean over images of the largest difference of a logit.
    """

    drop: float
    agreement: float
    logit_error: float


class Measure:
    """Measures what assignments of precisions cost, on images.

    Args:
        make: a runtime whose sub-layers have the precisions assigned to them.
        wanted: fp32's logits [B, C] on the images.
        images: [B, 3, S, S].
        labels: of the images, None where they have none.
    """

    def __init__(
        self, make: Callable[[Assigned], Runtime], wanted: Float, images: Float, labels: Sequence[int | None]
    ) -> None:
        self._make, self._wanted, self._images = make, wanted, images
        self._labels = np.array([-1 if label is None else label for label in labels])

    def loss(self, assigned: Assigned, most: int | None = None) -> Loss:
        """What an assignment costs, on the first `most` images."""
        wanted, labels = self._wanted[:most], self._labels[:most]
        try:
            found = self._make(assigned).run(self._images[:most]).logits
        except NotFiniteError:
            return Loss(100.0, 0.0, OVERFLOW_ERROR)
        agreement = float((found.argmax(1) == wanted.argmax(1)).mean())
        known = labels >= 0
        drop = 1 - agreement
        if known.any():
            drop = float(((wanted.argmax(1) == labels)[known].mean()) - (found.argmax(1) == labels)[known].mean())
        return Loss(100 * drop, agreement, float(np.abs(found - wanted).max(1).mean()))


class Search:
    """Finds which sub-layers to put back into fp16.

    Args:
        measure: what assignments cost.
        int8, fp16: every sub-layer's precision where the model is asked for in these.
        max_drop: points that may be lost.
        progress: told the stage and the share done.

    Attributes:
        sensitivity: by sub-layer, what it costs when it alone is int8, the costliest first.
        loss: of the assignment found.
    """

    def __init__(self, measure: Measure, int8: Assigned, fp16: Assigned, max_drop: float, progress: Progress) -> None:
        self._measure, self._int8, self._max_drop = measure, int8, max_drop
        back = "put back for accuracy"
        self._back = {
            sublayer: Assignment(found.precision, back if found.reason is None else f"{back}; {found.reason}")
            for sublayer, found in fp16.items()
        }
        self._progress = progress
        sublayers = [sublayer for sublayer, found in int8.items() if found.precision == "int8"]
        losses = {}
        for done, one in enumerate(sublayers, 1):
            losses[one] = measure.loss(self._with(other for other in sublayers if other != one), SENSITIVITY_IMAGES)
            progress("measuring sensitivity", done / len(sublayers))
        order = sorted(losses, key=lambda one: (max(0.0, losses[one].drop), losses[one].logit_error), reverse=True)
        self.sensitivity = {one: losses[one] for one in order}
        self.loss = Loss(0.0, 1.0, 0.0)

    def _with(self, put_back: Iterable[Sublayer]) -> dict[Sublayer, Assignment]:
        """The int8 assignment with some sub-layers as in fp16's."""
        return {**self._int8, **{sublayer: self._back[sublayer] for sublayer in put_back}}

    def run(self) -> dict[Sublayer, Assignment]:
        """Puts back the most sensitive sub-layers until the drop is within bounds, then takes back what can be.

        Raises:
            InputError: the bound cannot be met; the message says what was the best.
        """
        order, best = list(self.sensitivity), np.inf
        for count in range(len(order) + 1):
            back = order[:count]
            self.loss = self._measure.loss(self._with(back))
            best = min(best, self.loss.drop)
            self._progress("putting sub-layers back", (count + 1) / (len(order) + 1))
            if self.loss.drop <= self._max_drop:
                break
        else:
            raise InputError(
                f"`max_drop={self._max_drop:g}` cannot be met: the best was a drop of {best:.2f} points, "
                f"with up to all of {len(order)} sub-layers in fp16; allow more, or export with `precision='fp16'`"
            )
        for one in reversed(back[:-1]):
            fewer = [other for other in back if other != one]
            loss = self._measure.loss(self._with(fewer))
            if loss.drop <= self._max_drop:
                back, self.loss = fewer, loss
        return self._with(back)

    def report(self) -> dict[str, Any]:
        """The sensitivity table and what the assignment found costs, for reports."""
        return {
            "sensitivity": {sublayer.name: asdict(loss) for sublayer, loss in self.sensitivity.items()},
            "loss": asdict(self.loss),
        }
