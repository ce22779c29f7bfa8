"""What is worth a session with the weights as constants: the time that it saves, by its bytes."""

from __future__ import annotations

from collections import defaultdict

from adavit.architecture import Architecture
from adavit.bundle.keys import BOTH, BlockKey
from adavit.macs import attention_macs, dense_macs, mlp_macs
from adavit.runtime.backend import Usage, Use
from adavit.runtime.backends.host import Prepared, matrix_bytes

__all__ = ["most_saving", "saved_macs"]

BYTES = 192 << 20
"""Of the constants of prepared blocks, at most."""
COPIES = 1.5
"""Of the blocks' weights, at most, where that is less."""
LEAST = 2e-4
"""Share of the dense MACs that a prepared block has to save of an image's time, to be worth its memory."""
GATHERED = 0.1
"""Time of a MAC with weights that are inputs, beyond one with constants, in MACs."""
COPIED = 8
"""Time of copying one weight, in MACs: 32 (10 GB/s against 73 GMAC/s) for a set of heads in four that is new."""
CALLS = 1_000_000
"""What a block with constants spares beside, in MACs."""


def most_saving(arch: Architecture, usage: Usage) -> list[Prepared]:
    """The blocks and heads that save most by their bytes, the best first, as far as memory allows."""
    saved = defaultdict[Prepared, float](float)
    for use, often in usage.items():
        if use.key.heads and any(use.key.sublayers):
            saved[Prepared(use.threads, use.key)] += often * saved_macs(arch, use)
    least = LEAST * dense_macs(arch)
    sizes = {prepared: matrix_bytes(arch, prepared.key) for prepared, macs in saved.items() if macs >= least}
    all_heads = BlockKey(0, BOTH, tuple(range(arch.heads)))
    chosen: list[Prepared] = []
    free = min(BYTES, COPIES * arch.depth * matrix_bytes(arch, all_heads))
    for prepared in sorted(sizes, key=lambda found: saved[found] / sizes[found], reverse=True):
        if sizes[prepared] <= free:
            chosen.append(prepared)
            free -= sizes[prepared]
    return chosen


def saved_macs(arch: Architecture, use: Use) -> float:
    """The time, in MACs, that a block gains of having its weights as constants."""
    sublayers, count = use.key.sublayers, len(use.key.heads)
    macs = sublayers.attention * attention_macs(arch, use.tokens, count)
    macs += sublayers.mlp * mlp_macs(arch, use.tokens, count)
    copied = 0 if count == arch.heads else matrix_bytes(arch, use.key) / 4
    return CALLS + GATHERED * macs + COPIED * copied
