"""What a run made of images: logits, the policy that each image used, and predictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.policy import Policy
from adavit.bundle.preprocessing import Preprocessor
from adavit.errors import InputError, shown
from adavit.macs import image_macs

__all__ = ["Prediction", "Result", "checked_policy"]

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Result:
    """What a run computed for B images.

    Attributes:
        logits: float32 [B, C].
        policy: what each image used.
        architecture: the model's shapes.
        preprocessor: how pictures become such images, and back; `adavit.draw` needs it.
    """

    logits: Float
    policy: Policy
    architecture: Architecture = field(repr=False)
    preprocessor: Preprocessor | None = field(default=None, repr=False)

    @cached_property
    def macs(self) -> npt.NDArray[np.int64]:
        """Multiply-accumulates of each image, stem and head included: int64 [B]."""
        return image_macs(self.architecture, self.policy.tokens, self.policy.heads, self.policy.sublayers)

    def __getitem__(self, images: slice | npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Result:
        """The result of some images, by a slice or an array of numbers; raises InputError where there are none such."""
        logits: Any = self.logits
        policy = checked_policy(self.policy)[images]
        if not isinstance(logits, np.ndarray) or logits.shape[:1] != (len(self.policy),):
            raise InputError(f"the result's logits are not of the {len(self.policy)} images that its policy is of")
        return Result(logits[images], policy, self.architecture, self.preprocessor)


@dataclass(frozen=True)
class Prediction:
    """One image's most probable classes, or why there are none.

    Attributes:
        top: (label, probability) pairs, most probable first; empty where the image could not be read.
        classes: the same classes as indices.
        macs: multiply-accumulates the image took.
        usage: mean share of tokens, heads and sub-layers it used; see `Policy.usage`.
        policy: what the image used, a Policy of one image; None where the image could not be read.
        error: why the image could not be read, or None.
    """

    top: tuple[tuple[str, float], ...] = ()
    classes: tuple[int, ...] = ()
    macs: int = 0
    usage: dict[str, float] | None = None
    error: str | None = None
    policy: Policy | None = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """The (label, probability) pairs."""
        return iter(self.top)


def checked_policy(value: object) -> Policy:
    """A policy that a caller gave; raises InputError where it is none."""
    if not isinstance(value, Policy):
        raise InputError(f"policy is {shown(value)}: expected an adavit.Policy, as a result has it")
    return value
