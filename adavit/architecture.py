"""The shape of an AdaViT: everything that is fixed once a checkpoint is chosen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from adavit.errors import shown

__all__ = ["TOKEN_LOGIT", "TOKEN_THRESHOLD", "Architecture"]

TOKEN_THRESHOLD = 0.6
"""A patch token is kept iff the sigmoid of its logit is above this; heads and sub-layers use 0.5."""

TOKEN_LOGIT = math.log(TOKEN_THRESHOLD / (1 - TOKEN_THRESHOLD))
"""The same for the logit itself: 0.405..."""

_LIMITS = {  # Upper bounds far above any published model: a file that exceeds them is not to be trusted.
    "image_size": 8192,
    "patch_size": 256,
    "width": 16384,
    "depth": 1024,
    "heads": 1024,
    "hidden": 131072,
    "classes": 1_000_000,
    "keep": 1024,
}
MOST_MEMORY = 16 << 30
"""Bytes that one image may take while it runs."""
MOST_WEIGHTS = 16 * 10**9
"""Weights that a model may have."""


@dataclass(frozen=True)
class Architecture:
    """Shapes of an AdaViT, in the notation of Meng et al. (CVPR 2022).

    Attributes:
        stem: "patch" (one strided convolution) or "t2t" (tokens-to-token).
        image_size: side of the square input, in pixels.
        patch_size: pixels per patch side; 16 for a T2T stem.
        width: token width D.
        depth: number of blocks L.
        heads: attention heads H of every block; the head width is D / H.
        hidden: hidden width of the MLP, R * D.
        classes: number of output classes.
        keep: leading blocks that no head or sub-layer policy adapts.
        qkv_bias: whether query, key and value have a bias.
        token_policy, head_policy, sublayer_policy: which policies the checkpoint holds.
    """

    stem: str
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    hidden: int
    classes: int
    keep: int
    qkv_bias: bool
    token_policy: bool
    head_policy: bool
    sublayer_policy: bool

    def __post_init__(self) -> None:
        if self.stem not in ("patch", "t2t"):
            raise ValueError(f"unknown stem {shown(self.stem)}: expected 'patch' or 't2t'")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            lowest = 0 if name == "keep" else 1
            if type(value) is not int or not lowest <= value <= limit:
                raise ValueError(f"{name} is {shown(value)}: expected a whole number from {lowest} to {limit}")
        for name in ("qkv_bias", "token_policy", "head_policy", "sublayer_policy"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {shown(getattr(self, name))}: expected true or false")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.image_size % self.patch_size:
            raise ValueError(f"image side {self.image_size} is not a multiple of the patch side {self.patch_size}")
        if self.stem == "t2t" and self.patch_size != 16:
            raise ValueError(f"patch side is {self.patch_size}: the stem 't2t' makes patches of 16 pixels")
        if self.keep > self.depth:
            raise ValueError(f"keep is {self.keep}, more than the depth {self.depth}")
        if self.memory > MOST_MEMORY:
            raise ValueError(
                f"{self.tokens} tokens of width {self.width} in {self.heads} heads would take "
                f"{self.memory / 2**30:.0f} GiB an image; the most is {MOST_MEMORY >> 30}"
            )
        if self.weights > MOST_WEIGHTS:
            billions = self.weights / 1e9
            raise ValueError(f"it would have {billions:.0f} billion weights; the most is {MOST_WEIGHTS // 10**9}")

    @property
    def head_width(self) -> int:
        """Width d of one attention head."""
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches per image side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patch tokens P."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Tokens N = 1 + P, the class token first."""
        return 1 + self.patches

    @property
    def memory(self) -> int:
        """Bytes of float32 that one image takes at about: pixels, attention's scores, and tokens in some copies."""
        pixels, scores = 3 * self.image_size**2, self.heads * self.tokens**2
        return 4 * (pixels + scores + self.tokens * (8 * self.width + self.hidden + self.depth))

    @property
    def weights(self) -> int:
        """About how many weights there are in the blocks, the stem's projection and the head."""
        block = 4 * self.width**2 + 2 * self.width * self.hidden
        return self.depth * block + self.width * (3 * self.patch_size**2 + self.tokens + self.classes)

    @property
    def norm_epsilon(self) -> float:
        """Layer-normalisation epsilon of the model family: T2T-ViT 1e-5, DeiT 1e-6."""
        return 1e-5 if self.stem == "t2t" else 1e-6

    @property
    def policies(self) -> tuple[str, ...]:
        """What the model decides on: some of "tokens", "heads" and "sublayers"; nothing in a plain ViT."""
        kinds = {"tokens": self.token_policy, "heads": self.head_policy, "sublayers": self.sublayer_policy}
        return tuple(kind for kind, decides in kinds.items() if decides)

    @property
    def adapts(self) -> bool:
        """Whether there is any policy."""
        return bool(self.policies)

    def adapts_heads(self, block: int) -> bool:
        """Whether `block` has a head policy."""
        return self.head_policy and block >= self.keep

    def adapts_sublayers(self, block: int) -> bool:
        """Whether `block` has a sub-layer policy."""
        return self.sublayer_policy and block >= self.keep

    def policy_outputs(self, block: int) -> int:
        """How many outputs the head and sub-layer policies of `block` have."""
        return self.adapts_heads(block) * self.heads + self.adapts_sublayers(block) * 2

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Architecture:
        """Reads what `to_dict` wrote, checking every field.

        Raises:
            ValueError: a field is missing, unknown, of another type or out of bounds.
        """
        if not isinstance(values, dict):
            raise ValueError("the architecture is not an object")
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"architecture fields differ: {sorted(names ^ set(values))}")
        return cls(**values)
