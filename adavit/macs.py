"""The cost model: multiply-accumulates of a stem, a block under its policy, and a whole image.

Per block with K kept tokens (class token counted), h kept heads and a, m in {0, 1}:

    a * [K * (3 * D * h * d + h * d * D) + 2 * K^2 * h * d]  +  m * K * (h * d * R * D + R * D * D)

and nothing where no head is kept: attention is then its output bias, the MLP one vector for all tokens.
Full T2T-ViT-19 and DeiT-S blocks come to 0.430 and 0.378 GMACs; the released table, which counts a little
beside matrix products, says 0.431 and 0.379. Decisions
(under 0.05 % of a model) are not counted, as in the paper.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture

__all__ = ["batch_macs", "block_macs", "dense_macs", "image_macs", "outside_macs"]

PERFORMER_WIDTH = 64
PERFORMER_FEATURES = 32

Int = npt.NDArray[np.int64]
Count = TypeVar("Count", int, Int)


def attention_macs(arch: Architecture, kept_tokens: Count, kept_heads: Count) -> Count:
    """MACs of an attention sub-layer that runs."""
    channels = kept_heads * arch.head_width
    return kept_tokens * 4 * arch.width * channels + 2 * kept_tokens * kept_tokens * channels


def mlp_macs(arch: Architecture, kept_tokens: Count, kept_heads: Count) -> Count:
    """MACs of an MLP sub-layer that runs."""
    return (kept_heads > 0) * kept_tokens * arch.hidden * (kept_heads * arch.head_width + arch.width)


def block_macs(arch: Architecture, kept_tokens: Count, kept_heads: Count, attention: Count, mlp: Count) -> Count:
    """MACs of one block under its policy, of plain numbers or of arrays of one shape."""
    return attention * attention_macs(arch, kept_tokens, kept_heads) + mlp * mlp_macs(arch, kept_tokens, kept_heads)


def batch_macs(
    arch: Architecture,
    attention_rows: Count,
    attention_images: Count,
    attention_tokens: Count,
    mlp_rows: Count,
    heads: int | None = None,
) -> Count:
    """MACs that a block multiplies for a batch, padding included; see `adavit.graphs.batch`.

    Args:
        arch: the model's shapes.
        attention_rows: T, rows in attention's linear layers.
        attention_images: A, images in attention's products.
        attention_tokens: K, tokens that each of these images is padded to.
        mlp_rows: U, rows in the MLP.
        heads: h, heads that the graph has; by default all.
    """
    channels = (arch.heads if heads is None else heads) * arch.head_width
    linear = attention_rows * 4 * arch.width * channels
    products = 2 * attention_images * attention_tokens * attention_tokens * channels
    return linear + products + mlp_rows * arch.hidden * (channels + arch.width)


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
    return outside_macs(arch) + arch.depth * block_macs(arch, arch.tokens, arch.heads, 1, 1)


def image_macs(arch: Architecture, tokens: npt.ArrayLike, heads: npt.ArrayLike, sublayers: npt.ArrayLike) -> Int:
    """MACs of each image under its policy.

    Args:
        arch: the model's shapes.
        tokens: bool [B, L, N].
        heads: bool [B, L, H].
        sublayers: bool [B, L, 2], attention then MLP.

    Returns:
        int64 [B], stem and head included.
    """
    runs = np.asarray(sublayers, np.int64)
    counts = np.asarray(tokens, np.int64).sum(-1), np.asarray(heads, np.int64).sum(-1)
    blocks = block_macs(arch, counts[0], counts[1], runs[..., 0], runs[..., 1])
    return np.asarray(outside_macs(arch) + blocks.sum(-1), np.int64)
