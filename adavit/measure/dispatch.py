"""How batches went on a device: which way, how many images ran again, and what padding costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from adavit.architecture import Architecture
from adavit.bundle.policy import Policy
from adavit.macs import batch_macs, image_macs, outside_macs
from adavit.runtime.batch import BatchBackend, Rooms
from adavit.runtime.batch_dispatcher import Ran

__all__ = ["asked_of_blocks", "dispatch_report"]


def asked_of_blocks(arch: Architecture, policy: Policy) -> int:
    """MACs that policies ask for in all blocks, of all images."""
    return int(image_macs(arch, *policy.masks()).sum()) - len(policy) * outside_macs(arch)


def dispatch_report(arch: Architecture, backend: BatchBackend, ran: Sequence[Ran], asked: int) -> dict[str, Any]:
    """The numbers under the key `dispatch` of `adavit-run --json`.

    Args:
        arch: the model's shapes.
        backend: what ran.
        ran: how batches went.
        asked: MACs that the policies of their images ask for, in all blocks.
    """
    usual = [len(heads) for heads in backend.usual_heads] if backend.usual_heads else [arch.heads] * arch.depth
    first = sum(_multiplied(arch, batch.rooms, usual) for batch in ran)
    again = sum(_multiplied(arch, batch.again, [arch.heads] * arch.depth) for batch in ran)
    return {
        "ways": dict(Counter(batch.way for batch in ran)),
        "batches": len(ran),
        "overflowed_batches": sum(batch.overflowed > 0 for batch in ran),
        "images": sum(batch.images for batch in ran),
        "overflowed_images": sum(batch.overflowed for batch in ran),
        "macs_asked": asked,
        "macs_multiplied": first + again,
        "macs_of_overflows": again,
        "padding": (first + again) / asked if asked else None,
    }


def _multiplied(arch: Architecture, rooms: Rooms, heads: Sequence[int]) -> int:
    return sum(batch_macs(arch, *room, heads=count) for room, count in zip(rooms, heads, strict=bool(rooms)))
