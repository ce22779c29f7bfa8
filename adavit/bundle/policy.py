"""A recorded policy: which tokens, heads and sub-layers each image used in each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.arguments import whole
from adavit.errors import InputError, one_line, shown
from adavit.files import write_beside
from adavit.reading import path_of, read_arrays

__all__ = ["Policy"]

Bool = npt.NDArray[np.bool_]

KINDS = ("tokens", "heads", "sublayers")
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
        """The policy that keeps everything, of `batch` images; raises InputError if an argument is of a wrong type."""
        policy = cls.empty(arch, batch)
        for mask in policy.masks():
            mask[...] = True
        return policy

    @classmethod
    def empty(cls, arch: Architecture, batch: int) -> Policy:
        """A policy of `batch` images to fill in, not initialised; raises InputError as `dense` does."""
        if not isinstance(arch, Architecture):
            raise InputError(f"arch is {shown(arch)}: expected an Architecture, such as Runtime.architecture")
        batch = whole("batch", batch, 0, MOST_BYTES // (arch.depth * (arch.tokens + arch.heads + 2)))
        others = np.empty((batch, arch.depth, arch.heads + 2), bool)
        return cls(
            np.empty((batch, arch.depth, arch.tokens), bool),
            others[..., :-2],
            others[..., -2:],
        )

    def masks(self) -> tuple[Bool, Bool, Bool]:
        """Tokens, heads and sub-layers; raises InputError unless they are masks of the same images and blocks."""
        masks: tuple[Any, ...] = (self.tokens, self.heads, self.sublayers)
        for name, mask in zip(KINDS, masks, strict=True):
            if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 3:
                raise InputError(f"policy.{name} is {_described(mask)}: expected bool of 3 dimensions")
        if len({mask.shape[:2] for mask in masks}) > 1:
            shapes = ", ".join(str(list(mask.shape)) for mask in masks)
            raise InputError(f"the policy's masks are of different images or blocks: {shapes}")
        return masks

    def __len__(self) -> int:
        return len(self.masks()[0])

    def __getitem__(self, images: slice | npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Policy:
        """The policy of some images, by a slice or an array of numbers; raises InputError if there are none such."""
        masks = self.masks()
        if not isinstance(images, slice | np.ndarray) or (isinstance(images, np.ndarray) and images.ndim != 1):
            raise InputError(f"{shown(images)} names no images: expected a slice, or a flat array of numbers")
        try:
            return Policy(*(mask[images] for mask in masks))
        except MemoryError:
            raise
        except Exception as error:  # numpy's, or of a foreign __index__
            reason = one_line(error)
            raise InputError(f"{shown(images)} names no images of a policy of {len(masks[0])}: {reason}") from None

    def usage(self) -> dict[str, float]:
        """Mean share of tokens, heads and sub-layers that ran, over images and all blocks.

        A block whose two sub-layers are off uses no token and no head; see `executed`.

        Raises:
            InputError: the policy is of no image.
        """
        masks = self.executed().masks()
        if not all(mask.size for mask in masks):
            raise InputError("the policy is empty: it is of no image, and has no usage")
        return {kind: float(mask.mean()) for kind, mask in zip(KINDS, masks, strict=True)}

    def executed(self) -> Policy:
        """What ran: blocks whose two sub-layers are off keep no tokens, not even the class token, and no heads.

        It is for counting and drawing. It cannot be replayed: a policy keeps the class token in every block.
        """
        tokens, heads, sublayers = self.masks()
        runs = sublayers.any(-1, keepdims=True)
        return Policy(tokens & runs, heads & runs, sublayers)

    def check(self, arch: Architecture, batch: int) -> None:
        """Raises InputError unless the policy fits `batch` images of a model, at least one."""
        if not isinstance(arch, Architecture):
            raise InputError(f"arch is {shown(arch)}: expected an Architecture, such as Runtime.architecture")
        batch = whole("batch", batch, 0, MOST_BYTES)
        if batch == 0:
            raise InputError("the policy is empty: expected one of at least one image")
        wanted = {
            "tokens": (batch, arch.depth, arch.tokens),
            "heads": (batch, arch.depth, arch.heads),
            "sublayers": (batch, arch.depth, 2),
        }
        for name, shape in wanted.items():
            mask: Any = getattr(self, name)
            if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != shape:
                raise InputError(
                    f"policy.{name} is {_described(mask)}: these images and this model need bool {list(shape)}"
                )
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
        """Writes the policy to a file (npz), which appears whole or not at all.

        Raises:
            InputError: its masks do not fit each other, or the file cannot be written.
        """
        masks, path = self.masks(), path_of(path, "policy file")
        try:
            with write_beside(path.resolve()) as file:
                np.savez_compressed(file, tokens=masks[0], heads=masks[1], sublayers=masks[2])
        except (OSError, RuntimeError) as error:  # RuntimeError of links that go round
            raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, or not a policy.
        """
        path = path_of(path, "policy file")
        try:
            regular = path.is_file()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        if not regular:
            raise InputError(f"{path}: no such policy file; record one with adavit-run --record-policy")
        try:
            policy = cls(*read_arrays(path, KINDS, MOST_BYTES))
            policy.masks()
        except (ValueError, InputError) as error:
            raise InputError(f"{path}: not a recorded policy ({error}); record it again") from None
        return policy

    @classmethod
    def concatenate(cls, policies: Sequence[Policy]) -> Policy:
        """Joins the policies of consecutive batches; raises InputError if there are none, or of different models."""
        given = isinstance(policies, list | tuple) and all(isinstance(policy, Policy) for policy in policies)
        if not given or not policies:
            raise InputError(f"policies is {shown(policies)}: expected at least one adavit.Policy, in a list")
        try:
            return cls(*(np.concatenate(masks) for masks in zip(*(policy.masks() for policy in policies), strict=True)))
        except ValueError:
            raise InputError("the policies are of different models: their masks have other sizes") from None


def _described(mask: object) -> str:
    """What is given as a mask."""
    return f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
