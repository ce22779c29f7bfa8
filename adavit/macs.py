"""The cost model: multiply-accumulates of a stem, a block under its policy, and a whole image.

Per block with K kept tokens (class token counted), h kept heads and a, m in {0, 1}:

    a * [K * (3 * D * h * d + h * d * D) + 2 * K^2 * h * d]  +  m * K * (h * d * R * D + R * D * D)

and nothing where no head is kept: attention is then its output bias, the MLP one vector for all tokens.
Full T2T-ViT-19 and DeiT-S blocks come to 0.431 and 0.379 GMACs, as in the released table. Decisions
(under 0.05 % of a model) are not counted, as in the paper.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture

__all__ = ["block_macs", "dense_macs", "image_macs", "outside_macs"]

PERFORMER_WIDTH = 64
PERFORMER_FEATURES = 32

Int = npt.NDArray[np.int64]


def attention_macs(arch: Architecture, kept_tokens: npt.ArrayLike, kept_heads: npt.ArrayLike) -> Int:
    """MACs of an attention sub-layer that runs; broadcasts over its two counts."""
    k, channels = np.asarray(kept_tokens, np.int64), np.asarray(kept_heads, np.int64) * arch.head_width
    return k * 4 * arch.width * channels + 2 * k * k * channels


def mlp_macs(arch: Architecture, kept_tokens: npt.ArrayLike, kept_heads: npt.ArrayLike) -> Int:
    """MACs of an MLP sub-layer that runs; broadcasts over its two counts."""
    k, heads = np.asarray(kept_tokens, np.int64), np.asarray(kept_heads, np.int64)
    return np.where(heads > 0, k * arch.hidden * (heads * arch.head_width + arch.width), 0)


def block_macs(
    arch: Architecture,
    kept_tokens: npt.ArrayLike,
    kept_heads: npt.ArrayLike,
    attention: npt.ArrayLike,
    mlp: npt.ArrayLike,
) -> Int:
    """MACs of one block under its policy; every argument broadcasts, the result is int64."""
    return np.asarray(attention, np.int64) * attention_macs(arch, kept_tokens, kept_heads) + np.asarray(
        mlp, np.int64
    ) * mlp_macs(arch, kept_tokens, kept_heads)


def outside_macs(arch: Architecture) -> int:
    """MACs of the stem and the classification head, which every image pays."""
    head = arch.width * arch.classes
    if arch.stem == "patch":
        return arch.patches * arch.width * 3 * arch.patch_size**2 + head
    width, features = PERFORMER_WIDTH, PERFORMER_FEATURES

    def performer(inputs: int) -> int:  # kqv, proj, two MLP layers; two feature maps, two products with them
        return inputs * 3 * width + 3 * width * width + 4 * features * width

    total = performer(3 * 7 * 7) * (arch.image_size // 4) ** 2
    total += performer(width * 3 * 3) * (arch.image_size // 8) ** 2
    total += arch.patches * width * 3 * 3 * arch.width
    return total + head


def dense_macs(arch: Architecture) -> int:
    """MACs of one image with every policy on."""
    return outside_macs(arch) + arch.depth * int(block_macs(arch, arch.tokens, arch.heads, True, True))


def image_macs(arch: Architecture, tokens: npt.ArrayLike, heads: npt.ArrayLike, sublayers: npt.ArrayLike) -> Int:
    """MACs of each image under its policy.

    Args:
        arch: the model's shapes.
        tokens: bool [B, L, N]; heads: bool [B, L, H]; sublayers: bool [B, L, 2] (attention, MLP).

    Returns:
        int64 [B], stem and head included.
    """
    sub = np.asarray(sublayers, bool)
    counts = np.asarray(tokens, bool).sum(-1), np.asarray(heads, bool).sum(-1)
    blocks = block_macs(arch, counts[0], counts[1], sub[..., 0], sub[..., 1])
    return np.asarray(outside_macs(arch) + blocks.sum(-1), np.int64)
