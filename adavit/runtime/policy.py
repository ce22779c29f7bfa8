"""A recorded policy: which tokens, heads and sub-layers each image used in each block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.errors import InputError
from adavit.files import read_arrays, write_beside

__all__ = ["Policy"]

Bool = npt.NDArray[np.bool_]

MOST_BYTES = 4 << 30
"""Of a recorded policy; 50,000 images of T2T-ViT-19 take 190 MB."""


@dataclass(frozen=True)
class Policy:
    """What a batch of B images used of a model with L blocks, N tokens and H heads.

    Attributes:
        tokens: bool [B, L, N], class token (always kept) first.
        heads: bool [B, L, H].
        sublayers: bool [B, L, 2], attention then MLP.

    Blocks without a policy of some kind are all true in it.
    """

    tokens: Bool
    heads: Bool
    sublayers: Bool

    @classmethod
    def dense(cls, arch: Architecture, batch: int) -> Policy:
        """The policy that keeps everything."""
        return cls(
            np.ones((batch, arch.depth, arch.tokens), bool),
            np.ones((batch, arch.depth, arch.heads), bool),
            np.ones((batch, arch.depth, 2), bool),
        )

    @classmethod
    def empty(cls, arch: Architecture, batch: int) -> Policy:
        """One to be filled, with no values yet."""
        choices = np.empty((batch, arch.depth, arch.heads + 2), bool)
        return cls(np.empty((batch, arch.depth, arch.tokens), bool), choices[..., :-2], choices[..., -2:])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, images: slice | npt.NDArray[np.int64]) -> Policy:
        return Policy(self.tokens[images], self.heads[images], self.sublayers[images])

    def usage(self) -> dict[str, float]:
        """Mean share of tokens, heads and sub-layers kept, over images and blocks."""
        return {
            "tokens": float(self.tokens.mean()),
            "heads": float(self.heads.mean()),
            "sublayers": float(self.sublayers.mean()),
        }

    def check(self, arch: Architecture, batch: int) -> None:
        """Raises InputError where the policy does not fit `batch` images of a model."""
        wanted = {
            "tokens": (batch, arch.depth, arch.tokens),
            "heads": (batch, arch.depth, arch.heads),
            "sublayers": (batch, arch.depth, 2),
        }
        for name, shape in wanted.items():
            mask: Any = getattr(self, name)
            if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != shape:
                found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
                raise InputError(f"policy.{name} is {found}: these images and this model need bool {list(shape)}")
        if not self.tokens[..., 0].all():
            raise InputError("policy.tokens drops a class token: token 0 must be true in every block")
        if not arch.token_policy and not self.tokens.all():
            raise InputError("policy.tokens drops some, where this model always keeps all")
        for name, mask, adapts in (
            ("heads", self.heads, arch.adapts_heads),
            ("sublayers", self.sublayers, arch.adapts_sublayers),
        ):
            for block in range(arch.depth):
                if not adapts(block) and not mask[:, block].all():
                    raise InputError(f"policy.{name} drops some in block {block}, where this model always keeps all")

    def save(self, path: str | Path) -> None:
        """Writes the policy to `path` (npz), beside it first, then renamed."""
        with write_beside(Path(path).resolve()) as file:
            np.savez_compressed(file, tokens=self.tokens, heads=self.heads, sublayers=self.sublayers)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, or not a policy.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such policy file; record one with adavit-run --record-policy")
        try:
            names = "tokens", "heads", "sublayers"
            masks = dict(zip(names, read_arrays(path, names, MOST_BYTES), strict=True))
        except ValueError as error:
            raise InputError(f"{path}: not a recorded policy ({error}); record it again") from None
        if any(mask.dtype != bool or mask.ndim != 3 for mask in masks.values()):
            raise InputError(f"{path}: not a recorded policy (masks must be bool and of 3 dimensions)")
        return cls(**masks)

    @classmethod
    def concatenate(cls, policies: list[Policy]) -> Policy:
        """Joins the policies of consecutive batches."""
        return cls(
            np.concatenate([p.tokens for p in policies]),
            np.concatenate([p.heads for p in policies]),
            np.concatenate([p.sublayers for p in policies]),
        )
