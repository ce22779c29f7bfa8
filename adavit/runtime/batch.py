"""What the dispatcher of batches asks of a device: lanes, each with the memory of one batch on its way.

See `adavit.graphs.batch` for what the graphs take and make.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from adavit.bundle.policy import Policy

__all__ = ["GOES_ON", "NOT_FINITE", "OVERFLOWED", "BatchBackend", "Finished", "Lane", "Room", "rooms_of"]

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

GOES_ON, OVERFLOWED, NOT_FINITE = range(3)
"""States of an image, as graphs of batches have them."""


class Room(NamedTuple):
    """How much room a block's graph is given, each at least 1.

    Attributes:
        attention_rows: T, kept rows of all images that run attention.
        attention_images: A, images that do.
        attention_tokens: K, the most rows that one of them has.
        mlp_rows: U, kept rows of all images that run the MLP.
    """

    attention_rows: int
    attention_images: int
    attention_tokens: int
    mlp_rows: int

    @classmethod
    def of(cls, sizes: npt.NDArray[np.int64]) -> Room:
        """The room for what a graph asks for, int64 [4]."""
        return cls(*(max(1, size) for size in sizes.tolist()))


def rooms_of(policy: Policy) -> list[Room]:
    """The room that each block takes for a policy."""
    tokens = policy.tokens.sum(2)  # [B, L]
    each = tokens[:, :, None] * policy.sublayers  # [B, L, 2]
    sums, longest = each.sum(0), each.max(0)
    images = policy.sublayers[:, :, 0].sum(0)
    sizes = np.stack([sums[:, 0], images, longest[:, 0], sums[:, 1]], 1)
    return [Room.of(row) for row in sizes]


class Finished(NamedTuple):
    """What a batch of B images left.

    Attributes:
        logits: [B, C].
        kept: the policy, bool [L, B, N + H + 2]; that which was given, where one was followed.
        state: of each image, see `adavit.graphs.batch`, [B].
    """

    logits: Float
    kept: Bool
    state: npt.NDArray[np.int64]


class Lane(Protocol):
    """The memory of a batch of so many images on a device, and what runs it there; for other batches afterwards.

    One thread uses a lane at a time.
    """

    def start(self, images: Float, limits: Float, kept: Bool | None) -> None:
        """Takes a batch and runs the stem.

        Args:
            images: [B, 3, S, S].
            limits: what each block's decisions have to exceed, [L, B, 3].
            kept: a policy to follow instead, [L, B, N + H + 2].
        """
        ...

    def room(self, block: int) -> Room:
        """What a block takes, once the decisions for it are made: waits for them."""
        ...

    def block(self, block: int, room: Room) -> None:
        """Runs a block."""
        ...

    def decisions(self, block: int) -> Float:
        """The logits of a block's decisions [B, M'], M' of tokens, heads and sub-layers as far as it has policies."""
        ...

    def tokens(self) -> Float:
        """The tokens [B, N, D]: waits for them."""
        ...

    def finish(self) -> Finished:
        """What the batch left: waits for it."""
        ...


class BatchBackend(Protocol):
    """Runs a bundle's graphs of batches; one object per runtime, any thread may call it.

    Attributes:
        most_images: of a lane.
    """

    most_images: int

    def acquire(self, batch: int) -> Lane:
        """A lane for so many images, until it is released."""
        ...

    def release(self, lane: Lane) -> None:
        """Takes a lane back."""
        ...
