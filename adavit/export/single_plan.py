"""How each block of a single file runs its heads, chosen by what the policies kept on calibration images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adavit.architecture import Architecture
from adavit.bundle.policy import Policy
from adavit.graphs.single_heads import HeadSet
from adavit.graphs.single_sublayers import HeadPlan

__all__ = ["plan_heads"]

MASKED_FROM = 0.9
"""Mean share of heads that a block keeps, from which on masking is faster than gathering."""
RAREST = 0.02
"""Share of the images that a head set needs, to get constant weights."""
MOST_HEADS = 62
"""Heads whose sets are numbers of int64."""


@dataclass(frozen=True)
class _Choice:
    """Constant weights that a block could have.

    Attributes:
        share: of the images that run the sub-layer with this set.
        block, part: the block, and 0 for attention or 1 for the MLP.
        which: the set.
        bytes: of the weights.
    """

    share: float
    block: int
    part: int
    which: HeadSet
    bytes: int


def plan_heads(arch: Architecture, policy: Policy | None, spare: float, fused: bool, quantised: bool) -> list[HeadPlan]:
    """Plans each block.

    Args:
        arch: the model's shapes.
        policy: of calibration images, or None where there are none. Then every block gathers.
        spare: bytes that constant weights of head sets may take.
        fused: whether ONNX Runtime's own attention may run.
        quantised: whether the weights are int8. Then every block masks.
    """
    if quantised:
        return [HeadPlan(masked=True)] * arch.depth
    if policy is None:
        return [HeadPlan(fused=fused)] * arch.depth
    masked = [_keeps_most(policy, block) for block in range(arch.depth)]
    chosen: list[dict[int, list[HeadSet]]] = [{0: [], 1: []} for _ in range(arch.depth)]
    for one in sorted(_choices(arch, policy, masked), key=lambda choice: -choice.share):
        if one.bytes <= spare:
            spare -= one.bytes
            chosen[one.block][one.part].append(one.which)
    return [HeadPlan(masks, tuple(sets[0]), tuple(sets[1]), fused) for masks, sets in zip(masked, chosen, strict=True)]


def _keeps_most(policy: Policy, block: int) -> bool:
    """Whether nearly all heads are kept where a block runs."""
    runs = policy.sublayers[:, block].any(1)
    return bool(runs.any()) and float(policy.heads[runs, block].mean()) >= MASKED_FROM


def _choices(arch: Architecture, policy: Policy, masked: Sequence[bool]) -> list[_Choice]:
    """The constant weights that blocks which gather could have; what is saved by a byte grows with the share alone."""
    found = []
    rows = {0: 4 * arch.width, 1: arch.hidden}
    for block in range(arch.depth if arch.heads <= MOST_HEADS else 0):
        if masked[block] or not arch.adapts_heads(block):
            continue
        for part, outputs in rows.items():
            kept = policy.heads[policy.sublayers[:, block, part], block]
            sets = Counter(tuple(np.flatnonzero(heads).tolist()) for heads in kept)
            for which, count in sets.items():
                share, size = count / len(policy), 4 * outputs * len(which) * arch.head_width
                if which and share >= RAREST:
                    found.append(_Choice(share, block, part, which, size))
    return found
