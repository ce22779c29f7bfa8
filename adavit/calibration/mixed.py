"""Mixed precision: as much in int8 as keeps the accuracy within bounds, the most sensitive sub-layers in fp16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.calibration.convert import Assignment, engine_precision
from adavit.errors import InputError
from adavit.runtime.backend import Backend, Engine, Options, create_backend
from adavit.bundle.bundle import Bundle
from adavit.runtime.finite import NotFiniteError
from adavit.runtime.image_files import ImageFile
from adavit.runtime.session import Runtime

__all__ = ["Measure", "Search", "read_images"]

SENSITIVITY_IMAGES = 64
"""Images that each sub-layer's sensitivity is measured on."""
MOST_IMAGES = 512
"""Images that the drop is measured on."""

Float = npt.NDArray[np.float32]
OVERFLOW_ERROR = float(np.finfo(np.float32).max)
"""Stands for the error of logits that are not finite."""
Progress = Callable[[str, float], None]
Assigned = Mapping[str, Assignment]


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


def read_images(
    files: Sequence[ImageFile], preprocess: Callable[[Path], Float], most: int = MOST_IMAGES
) -> tuple[Float, list[int | None]]:
    """At most so many of the files, evenly spaced, those of them that can be read: [B, 3, S, S], and their labels.

    Raises:
        InputError: none of them can be read.
    """
    pixels, labels = [], []
    for at in np.linspace(0, len(files) - 1, min(len(files), most)).round().astype(int):
        try:
            pixels.append(preprocess(files[at].path))
            labels.append(files[at].label)
        except InputError:  # reported where the images are first run
            continue
    if not pixels:
        raise InputError(f"none of {min(len(files), most)} of the calibration images can be read; remove broken files")
    return np.stack(pixels), labels


class _Chosen:
    """A backend whose engines come from several bundles, each loaded once."""

    def __init__(
        self, backends: Mapping[str, Backend], loaded: dict[tuple[str, str], Engine], chosen: Mapping[str, str]
    ) -> None:
        self._backends, self._loaded, self._chosen = backends, loaded, chosen
        self.name, self.fixed = backends["fp32"].name, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backends["fp32"], name)

    def load(self, name: str, alone: bool = False) -> Engine:
        """See `Backend.load`."""
        key = self._chosen[name], name
        if key not in self._loaded:
            self._loaded[key] = self._backends[key[0]].load(name, alone)
        return self._loaded[key]


class Measure:
    """Measures what assignments of precisions cost, on images.

    Args:
        bundles: the bundle in fp32, fp16 and int8.
        options: of the runtime.
        decisions: the precision of the engines that decide.
        images: [B, 3, S, S].
        labels: of the images, None where they have none.
    """

    def __init__(
        self, bundles: Mapping[str, Bundle], options: Options, decisions: str, images: Float, labels: list[int | None]
    ) -> None:
        self._bundles, self._options, self._decisions = bundles, options, decisions
        self._backends = {name: create_backend("onnxruntime", bundle, options) for name, bundle in bundles.items()}
        self._loaded: dict[tuple[str, str], Engine] = {}
        self._images = images
        self._labels = np.array([-1 if label is None else label for label in labels])
        self._wanted = self._runtime({}).run(images).logits

    def _runtime(self, assigned: Assigned) -> Runtime:
        decisions = self._decisions if assigned else "fp32"
        chosen = {name: engine_precision(name, assigned, decisions) for name in self._bundles["fp32"].engines}
        engines = {name: self._bundles[precision].engines[name] for name, precision in chosen.items()}
        bundle = replace(self._bundles["fp32"], engines=engines)
        return Runtime(bundle, _Chosen(self._backends, self._loaded, chosen), self._options)

    def loss(self, assigned: Assigned, most: int | None = None) -> Loss:
        """What an assignment costs, on the first `most` images."""
        wanted, labels = self._wanted[:most], self._labels[:most]
        try:
            found = self._runtime(assigned).run(self._images[:most]).logits
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
        assigned: every unit's precision in the int8 bundle.
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
            name: Assignment(found.precision, back if found.reason is None else f"{back}; {found.reason}")
            for name, found in fp16.items()
        }
        self._progress = progress
        units = [name for name, found in int8.items() if found.precision == "int8" and name != "dense"]
        losses = {}
        for done, unit in enumerate(units, 1):
            losses[unit] = measure.loss(self._with(other for other in units if other != unit), SENSITIVITY_IMAGES)
            progress("measuring sensitivity", done / len(units))
        order = sorted(losses, key=lambda unit: (max(0.0, losses[unit].drop), losses[unit].logit_error), reverse=True)
        self.sensitivity = {unit: losses[unit] for unit in order}
        self.loss = Loss(0.0, 1.0, 0.0)

    def _with(self, put_back: Iterable[str]) -> dict[str, Assignment]:
        """The int8 assignment with some sub-layers as in fp16's."""
        return {**self._int8, **{unit: self._back[unit] for unit in put_back}}

    def run(self) -> dict[str, Assignment]:
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
                f"--max-drop {self._max_drop:g} cannot be met: the best was a drop of {best:.2f} points, "
                f"with up to all of {len(order)} sub-layers in fp16; allow more, or export with --precision fp16"
            )
        for unit in reversed(back[:-1]):
            fewer = [other for other in back if other != unit]
            loss = self._measure.loss(self._with(fewer))
            if loss.drop <= self._max_drop:
                back, self.loss = fewer, loss
        return self._with(back)

    def report(self) -> dict[str, Any]:
        """The sensitivity table and what the assignment found costs, for reports."""
        return {
            "sensitivity": {unit: asdict(loss) for unit, loss in self.sensitivity.items()},
            "loss": asdict(self.loss),
        }
