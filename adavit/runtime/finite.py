"""Whether what engines computed can be relied on: NaN and infinity make confident classes elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.errors import BackendError

__all__ = ["LARGEST", "NotFiniteError", "check_decisions", "check_image", "check_logits", "not_finite"]

LARGEST = 1e17
"""Of a token's values: of larger ones, the sum of squares that a layer norm takes overflows float32."""


class NotFiniteError(BackendError):
    """Engines computed values that are NaN, infinite or too large."""


def check_image(position: int, logits: npt.NDArray[Any], tokens: npt.NDArray[Any]) -> None:
    """Checks what an image's run left: logits [1, C], and tokens [N, D] behind the last block.

    Sub-layers add to the tokens, so that what was not finite in any of them is not finite at the end. Norms and the
    softmax would hide it from the logits.

    Raises:
        NotFiniteError: there are values that are NaN, infinite or too large.
    """
    if not (tokens.max() < LARGEST and tokens.min() > -LARGEST):  # NaN is both, where there is one
        raise not_finite(f"the tokens of image {position} are")
    if not np.isfinite(logits).all():
        raise not_finite(f"the logits of image {position} are")


def check_decisions(position: int, decisions: Sequence[npt.NDArray[Any]]) -> None:
    """Checks the logits of each block's decisions on an image; of none where they were not looked at.

    Raises:
        NotFiniteError: there are values that are NaN or infinite; the message names the first such block.
    """
    if decisions and not np.isfinite(np.concatenate(decisions)).all():
        block = next(block for block, logits in enumerate(decisions) if not np.isfinite(logits).all())
        raise not_finite(f"the decisions of block {block} on image {position} are")


def check_logits(logits: npt.NDArray[Any], whose: str, first: int = 0) -> None:
    """Checks the logits [B, C] of images, the first of which has the number `first`.

    Raises:
        NotFiniteError: an image's logits are not finite; the message names the image.
    """
    if (bad := ~np.isfinite(logits).all(1)).any():
        raise not_finite(f"{whose} of image {first + int(bad.argmax())} are")


def not_finite(what: str) -> NotFiniteError:
    """What to say of values that are not finite."""
    return NotFiniteError(
        f"{what} NaN, infinite or beyond {LARGEST:.0e}: the engines' weights are damaged, or their precision is too "
        "low for this image; check the bundle with adavit-export --check, or export in fp32"
    )
