"""Pictures become predictions: labels, probabilities, MACs and usage, some pictures at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.arguments import whole
from adavit.bundle.operating_points import Offsets, resolve
from adavit.bundle.preprocessing import ImageLike, pictures_of
from adavit.errors import InputError, shown
from adavit.results import Prediction, Result, checked_policy
from adavit.runtime.dispatcher import SIDE_BY_SIDE

if TYPE_CHECKING:
    from adavit.runtime.session import Runtime

__all__ = ["predict", "prediction_of"]

Float = npt.NDArray[np.float32]
TURNS = 2
"""Times as many pictures as run side by side are held at once."""


def predict(
    runtime: Runtime, images: Iterable[ImageLike] | ImageLike, top: int, budget: float | None
) -> list[Prediction]:
    """See `Runtime.predict`."""
    pictures = pictures_of(images)
    top = whole("top", top, 1)
    offsets = resolve(runtime.offsets if budget is None else budget, runtime.bundle)
    at_once = TURNS * max(SIDE_BY_SIDE, runtime.options.threads)
    predictions: list[Prediction] = []
    while some := list(islice(pictures, at_once)):
        predictions += _predict_some(runtime, some, top, offsets)
    return predictions


def _predict_some(runtime: Runtime, images: Sequence[ImageLike], top: int, offsets: Offsets) -> list[Prediction]:
    """The Predictions of pictures that are held at once."""
    pixels: dict[int, Float] = {}
    predictions: dict[int, Prediction] = {}
    for position, image in enumerate(images):
        try:
            pixels[position] = runtime.preprocess(image)
        except InputError as error:
            predictions[position] = Prediction(error=str(error))
    if pixels:
        result = runtime.run(np.stack(list(pixels.values())), budget=offsets)
        for row, position in enumerate(pixels):
            predictions[position] = runtime.prediction(result, row, top)
    return [predictions[position] for position in range(len(images))]


def prediction_of(result: Result, row: int, top: int, arch: Architecture, labels: Sequence[str]) -> Prediction:
    """See `Runtime.prediction`; `arch` and `labels` are the model's."""
    if not isinstance(result, Result):
        raise InputError(f"result is {shown(result)}: expected what Runtime.run returned")
    logits, classes = result.logits, len(labels)
    if not isinstance(logits, np.ndarray) or logits.shape != (len(checked_policy(result.policy)), classes):
        raise InputError(f"the result is of another model: its logits are not [images, {classes}]")
    if result.architecture != arch:
        raise InputError(f"the result is of another model: its architecture is {shown(result.architecture)}")
    row, top = whole("row", row, 0, len(logits) - 1), whole("top", top, 1)
    result.policy.check(arch, len(logits))
    if logits.dtype.kind != "f" or not np.isfinite(logits[row]).all():
        raise InputError(f"the result's logits of image {row} are not finite floats, but {logits.dtype}")
    scores = np.exp(logits[row] - logits[row].max(), dtype=np.float64)
    scores /= scores.sum()
    best = np.argsort(-scores, kind="stable")[:top]
    policy = result.policy[row : row + 1]
    return Prediction(
        tuple((labels[i], float(scores[i])) for i in best),
        tuple(int(i) for i in best),
        int(result.macs[row]),
        policy.usage(),
        policy=policy,
    )
