"""What engines are built for, by what policies kept on calibration images."""

from __future__ import annotations

import numpy as np

from adavit.bundle.bundle import Bundle
from adavit.bundle.policy import Policy
from adavit.bundle.statistics import operating_offsets, policy_at
from adavit.runtime.batch import Room, rooms_of
from adavit.tensorrt.profiles import Rooms

__all__ = ["common_rooms", "recorded_policy", "usual_heads"]

QUANTILE = 0.99
"""Of batches, which find the room that engines are tuned for."""


def recorded_policy(bundle: Bundle) -> Policy | None:
    """What calibration images kept, at all operating points together; None where a bundle has no statistics."""
    policies = [policy_at(bundle, offsets) for offsets in operating_offsets(bundle)]
    known = [policy for policy in policies if policy is not None]
    return Policy.concatenate(known) if known else None


def usual_heads(policy: Policy, share: float = 0.001) -> list[tuple[int, ...]]:
    """The heads of each block that more than a share of the images keep, at least one.

    Args:
        policy: of these images.
        share: of all images; those that do not run a block keep none of its heads.
    """
    kept = (policy.heads & policy.sublayers.any(2, keepdims=True)).mean(0)  # [L, H]
    kept[np.arange(len(kept)), kept.argmax(1)] = np.inf  # no block is left without heads
    return [tuple(np.flatnonzero(shares > share).tolist()) for shares in kept]


def common_rooms(policy: Policy) -> Rooms:
    """Tells the room in which nearly all batches of a size fit, the images taken as they come."""

    def rooms(batch: int) -> list[Room]:
        starts = range(0, len(policy) - batch + 1, batch) if len(policy) >= batch else [0]
        sizes = np.array([rooms_of(policy[start : start + batch]) for start in starts])  # [batches, L, 4]
        return [Room.of(row) for row in np.quantile(sizes, QUANTILE, axis=0, method="higher")]

    return rooms
