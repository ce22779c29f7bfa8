"""A model's weights as numpy arrays, by their released names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from adavit.model import AdaViT

__all__ = ["Weights"]


class Weights:
    """Read-only view of weights under a prefix.

    Attributes:
        prefix: what names here are relative to.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.float32]], prefix: str = "") -> None:
        self._arrays = arrays
        self.prefix = prefix

    @classmethod
    def of(cls, model: AdaViT) -> Weights:
        """The weights of a model, sharing its memory."""
        return cls({name: value.detach().numpy() for name, value in model.state_dict().items()})

    def under(self, prefix: str) -> Weights:
        """The weights whose names begin with `prefix` and a dot."""
        return Weights(self._arrays, f"{self.prefix}{prefix}.")

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        return self._arrays[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self._arrays
