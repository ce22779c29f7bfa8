"""Which of its two engines a sub-layer runs: the one that gathers the kept heads' weights, or the one with all.

Gathered weights lose what the backend prepares ahead for constant ones, and cost a copy when their set of heads is
new. Running all heads and masking the dropped ones costs their multiply-accumulates. Both are exact.
"""

from __future__ import annotations

from adavit.architecture import Architecture
from adavit.macs import attention_macs, mlp_macs

__all__ = ["gathers_attention", "gathers_mlp"]

GATHERED = 1.15
"""Time of a MAC with gathered weights, in MACs with constant ones (62 against 73 GMAC/s on two AVX2 cores)."""
COPIED = 8
"""Time of copying one weight, in MACs: 32 (10 GB/s against 73 GMAC/s) for a set of heads in four that is new."""


def gathers_attention(arch: Architecture, kept_tokens: int, kept_heads: int) -> bool:
    """Whether attention with these counts is faster with gathered weights than with all heads, masked."""
    gathered = GATHERED * attention_macs(arch, kept_tokens, kept_heads)
    copied = COPIED * 4 * arch.width * kept_heads * arch.head_width
    return gathered + copied < attention_macs(arch, kept_tokens, arch.heads)


def gathers_mlp(arch: Architecture, kept_tokens: int, kept_heads: int) -> bool:
    """Whether an MLP with these counts is faster with gathered weights; its second layer is never gathered."""
    narrowed = kept_heads * arch.head_width * arch.hidden
    gathered = mlp_macs(arch, kept_tokens, kept_heads) + (GATHERED - 1) * kept_tokens * narrowed
    return gathered + COPIED * narrowed < mlp_macs(arch, kept_tokens, arch.heads)
