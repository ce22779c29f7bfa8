"""What the dispatcher of batches asks of a device: lanes, each with the memory of one batch on its way.

See `adavit.graphs.batch` for what the graphs take and make.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.keys import GOES_ON, NOT_FINITE, OVERFLOWED
from adavit.bundle.policy import Policy

__all__ = [
    "CAPACITY",
    "CONDITIONAL",
    "EXACT",
    "GOES_ON",
    "NOT_FINITE",
    "OVERFLOWED",
    "WAYS",
    "BatchBackend",
    "Finished",
    "Lane",
    "Room",
    "Rooms",
    "policy_of",
    "rooms_of",
]

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

WAYS = EXACT, CAPACITY, CONDITIONAL = "exact", "capacity", "conditional"
"""How a batch is driven. Exact: the host fetches how much room each block takes. Capacity: room is planned, and nothing
is fetched before the end. Conditional: so, too, and what no image of the batch runs is skipped on the device."""


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

    def within(self, batch: int, tokens: int) -> Room:
        """No more than so many images of so many tokens can take, whatever a graph asks for."""
        rows = batch * tokens
        return Room(*map(min, self, (rows, batch, tokens, rows)))


Rooms = tuple[Room, ...]
"""Of all blocks."""


def rooms_of(policy: Policy) -> Rooms:
    """The room that each block takes for a policy."""
    tokens = policy.tokens.sum(2)  # [B, L]
    each = tokens[:, :, None] * policy.sublayers  # [B, L, 2]
    sums, longest = each.sum(0), each.max(0)
    images = policy.sublayers[:, :, 0].sum(0)
    sizes = np.stack([sums[:, 0], images, longest[:, 0], sums[:, 1]], 1)
    return tuple(Room.of(row) for row in sizes)


def policy_of(arch: Architecture, kept: Bool) -> Policy:
    """The policy that a batch's rows make, bool [L, B, N + H + 2]."""
    return Policy(*np.split(kept.swapaxes(0, 1), (arch.tokens, arch.tokens + arch.heads), 2))


class Finished(NamedTuple):
    """What a batch of B images left.

    Attributes:
        logits: [B, C].
        kept: the policy, bool [L, B, N + H + 2]; that which was given, where one was followed.
        state: of each image, [B].
    """

    logits: Float
    kept: Bool
    state: npt.NDArray[np.int64]


class Lane(Protocol):
    """The memory of a batch on a device, and what runs it there; for other batches afterwards.

    One thread uses a lane at a time. A batch is either started, and its blocks run one by one, or launched; then it is
    finished.
    """

    def start(self, images: Float, limits: Float, kept: Bool | None, every_head: bool) -> None:
        """Takes a batch and runs the stem.

        Args:
            images: [B, 3, S, S].
            limits: what each block's decisions have to exceed, [L, B, 3].
            kept: a policy to follow instead, [L, B, N + H + 2].
            every_head: run the blocks' engines that leave no head out.
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

    def launch(self, images: Float, limits: Float, rooms: Rooms, way: str) -> None:
        """Takes a batch and runs all of it without waiting, by capacity or conditionally."""
        ...

    def finish(self) -> Finished:
        """What the batch left: waits for it."""
        ...


class BatchBackend(Protocol):
    """Runs a bundle's graphs of batches; one object per runtime, any thread may call it.

    Attributes:
        name: as it is asked for.
        on_host: False.
        most_images: of a lane.
        usual_heads: for each block, the heads that its engine has; None where all have all.
    """

    name: str
    on_host: Literal[False]
    most_images: int
    usual_heads: tuple[tuple[int, ...], ...] | None

    def lane(self, batch: int) -> AbstractContextManager[Lane]:
        """A lane for so many images; it is given back in the end, and left alone after a failure."""
        ...

    def why_not(self, way: str) -> str | None:
        """Why a way cannot be gone here; None where it can."""
        ...

    def dense(self, images: Float) -> Float:
        """The logits [B, C] that the dense twin makes of images [B, 3, S, S].

        Raises:
            BundleError: there is no dense twin, or it is not the one that was exported.
        """
        ...

    def timings(self) -> Mapping[str, float]:
        """Milliseconds since the last call: "enqueue_ms" on the host, "gpu_ms" on the device, "sync_ms" waiting."""
        ...

    def versions(self) -> dict[str, str]:
        """What executes, by name and version, for reports."""
        ...
