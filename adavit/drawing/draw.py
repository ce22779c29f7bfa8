"""`adavit.draw`: what a run kept of each image, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from adavit.architecture import Architecture
from adavit.bundle.policy import Policy
from adavit.bundle.preprocessing import ImageLike, Preprocessor
from adavit.drawing.pictures import crops
from adavit.drawing.sheet import Sheet
from adavit.errors import InputError, shown
from adavit.macs import dense_macs
from adavit.results import Result

__all__ = ["MOST_IMAGES", "draw"]

MOST_IMAGES = 64
"""Images in one picture."""


def draw(
    result: Result,
    images: Iterable[ImageLike] | ImageLike | npt.NDArray[np.float32],
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """Draws what a run kept of each image, a row an image.

    A row shows the prediction with its probability, the MACs and their share of the dense ones; the image as the model
    saw it; and each block: its dropped patches faded, a dot for each head, a square for attention and a triangle for
    the MLP, filled where it ran. Of a block whose two sub-layers are off, nothing is kept; see `Policy.executed`.

    Args:
        result: what `Runtime.run` returned, of at most 64 images.
        images: the images that it is of, in the same order: float32 [B, 3, S, S], as given to `run`; or pictures,
            as `Runtime.predict` takes them, which are cropped as the bundle crops.
        labels: class names by index, such as `Runtime.labels`; by default classes are shown by their numbers.

    Returns:
        The picture, RGB on white. A notebook shows it, `save` writes it.

    Raises:
        InputError: the result is none, is incomplete or of too many images; images do not fit it or cannot be read;
            or labels are not one name for each class.

    Example:
        >>> import adavit
        >>> runtime = adavit.load("bundle")  # doctest: +SKIP
        >>> result = runtime.run(images)  # doctest: +SKIP
        >>> adavit.draw(result, images, runtime.labels).save("kept.png")  # doctest: +SKIP
    """
    if not isinstance(result, Result):
        raise InputError(f"result is {shown(result)}: expected what Runtime.run returned")
    count = _checked(result)
    preprocessor = result.preprocessor
    if not isinstance(preprocessor, Preprocessor) or preprocessor.side != result.architecture.image_size:
        raise InputError("the result does not tell how its images were cropped and normalised; take one of Runtime.run")
    names = _names(labels, result.architecture)
    sheet = Sheet(result.architecture, count)
    canvas = sheet.blank()
    dense = dense_macs(result.architecture)
    for row, pixels in enumerate(crops(images, preprocessor, count)):
        scores = np.exp(result.logits[row] - result.logits[row].max(), dtype=np.float64)
        best = int(scores.argmax())
        macs = int(result.macs[row])
        facts = [f"{scores[best] / scores.sum():.1%}", f"{macs / 1e9:.3f} GMACs", f"{macs / dense:.0%} of dense"]
        label = f"class {best}" if names is None else names[best]
        sheet.paint_caption(canvas, row, label, facts)
        sheet.paint_row(canvas, row, pixels, result.policy[row : row + 1], macs / dense)
    return canvas


def _checked(result: Result) -> int:
    """How many images a result is of; raises InputError where its parts do not fit, or they are too many."""
    logits: Any = result.logits
    policy: Any = result.policy
    if not isinstance(policy, Policy):
        raise InputError(f"the result's policy is {shown(policy)}: expected an adavit.Policy")
    count = len(policy)
    if count > MOST_IMAGES:
        raise InputError(f"the result is of {count} images: at most {MOST_IMAGES} are drawn; take some, result[:8]")
    policy.check(result.architecture, count)
    wanted = (count, result.architecture.classes)
    if not isinstance(logits, np.ndarray) or logits.dtype.kind != "f" or logits.shape != wanted:
        raise InputError(f"the result's logits are not floats {list(wanted)}, as its policy and model need them")
    if not np.isfinite(logits).all():
        raise InputError("the result's logits are not finite")
    return count


def _names(labels: Any, arch: Architecture) -> list[str] | None:
    """Class names that a caller gave."""
    if labels is None:
        return None
    given = isinstance(labels, Sequence) and not isinstance(labels, str | bytes)
    names = list(islice(labels, arch.classes + 1)) if given else []
    if len(names) != arch.classes or not all(isinstance(name, str) for name in names):
        raise InputError(f"labels is {shown(labels)}: expected {arch.classes} names, such as Runtime.labels")
    return names
