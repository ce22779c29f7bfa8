"""Batches on a device: a block of all images is one run, whatever each of them keeps.

Decisions are made on the device. A batch goes one of three ways, see `adavit.runtime.batch.WAYS`. Results are always
exact: images for which there was no room, or that want heads which engines leave out, run again by themselves, with as
much room as they take and with all heads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import Policy
from adavit.errors import BackendError
from adavit.runtime.batch import (
    EXACT,
    NOT_FINITE,
    OVERFLOWED,
    BatchBackend,
    Finished,
    Lane,
    Room,
    Rooms,
    policy_of,
    rooms_of,
)
from adavit.runtime.capacity_tables import CapacityTables
from adavit.runtime.dispatcher import Observer, Step, deciding_columns
from adavit.runtime.finite import check_logits, not_finite
from adavit.runtime.ways import Ways

__all__ = ["BatchDispatcher", "Ran"]

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

NOTED = 1024
"""Batches of which it is known how they went."""


class Ran(NamedTuple):
    """How a batch went.

    Attributes:
        way: one of WAYS.
        images: how many.
        rooms: what blocks were given.
        overflowed: images that ran again.
        again: what blocks were given for these.
    """

    way: str
    images: int
    rooms: Rooms
    overflowed: int = 0
    again: Rooms = ()


class Asked(NamedTuple):
    """At which operating points the images of a batch run.

    Attributes:
        distinct: their offsets, each once.
        limits: what the logits of each block's decisions have to exceed, tokens, heads, sub-layers: [L, B, 3].
    """

    distinct: tuple[Offsets, ...]
    limits: Float

    @classmethod
    def of(cls, offsets: Offsets | Sequence[Offsets], batch: int, depth: int) -> Asked:
        """What is asked for a batch of images of a model so deep: the same for all, or offsets for each."""
        if isinstance(offsets, Offsets):
            return cls((offsets,), np.broadcast_to(_limits(offsets, depth)[:, None], (depth, batch, 3)))
        places: dict[Offsets, int] = {}
        each = [places.setdefault(one, len(places)) for one in offsets]
        return cls(tuple(places), np.stack([_limits(one, depth) for one in places], 1)[:, each])


@lru_cache(256)
def _limits(offsets: Offsets, depth: int) -> Float:
    """Those of an image, [L, 3]."""
    # Rounded once, as `thresholds` are: decisions on a device are those on the host.
    return np.asarray(np.array([TOKEN_LOGIT, 0, 0]) - np.array(offsets.by_block(depth)).T, np.float32)


class BatchDispatcher:
    """Runs batches of images through a bundle's graphs of batches; see `Dispatcher`.

    Args:
        arch: the model's shapes.
        backend: runs them.
        ways: chooses one for each batch.
        tables: how much room batches take.

    Attributes:
        ran: how the last batches went, the oldest first.
    """

    def __init__(self, arch: Architecture, backend: BatchBackend, ways: Ways, tables: CapacityTables) -> None:
        self.arch, self.backend, self._ways, self._tables = arch, backend, ways, tables
        self.ran: deque[Ran] = deque(maxlen=NOTED)

    def run(
        self,
        images: Float,
        offsets: Offsets | Sequence[Offsets],
        replay: Policy | None = None,
        observe: Observer | None = None,
    ) -> tuple[Float, Policy]:
        """Runs images; see `Dispatcher.run`. An observer is shown all images of a block, then those of the next."""
        batch, most = len(images), self.backend.most_images
        done = []
        for start in range(0, batch, most):
            some = slice(start, min(start + most, batch))
            each = offsets if isinstance(offsets, Offsets) else offsets[some]
            asked = Asked.of(each, some.stop - start, self.arch.depth)
            if replay is None and observe is None:
                finished, ran = self._fastest(images[some], asked)
            else:
                follow = None if replay is None else replay[some]
                finished, ran = self._exact(images[some], asked.limits, follow, observe, start)
            done.append(finished)
            self.ran.append(ran)
        return self._unpacked(done, replay)

    def _unpacked(self, done: Sequence[Finished], replay: Policy | None) -> tuple[Float, Policy]:
        """The logits and the policy of batches that are done, one after the other, once they are checked."""
        start = 0
        for finished in done:
            self._check(finished, start)
            start += len(finished.logits)
        logits = np.concatenate([finished.logits for finished in done])
        if replay is not None:
            return logits, replay
        return logits, Policy.concatenate([policy_of(self.arch, finished.kept) for finished in done])

    def _fastest(self, images: Float, asked: Asked) -> tuple[Finished, Ran]:
        """Runs a batch the way that is chosen for it."""
        way = self._ways.choose(len(images), lambda way: self._run(way, images, asked))
        return self._run(way, images, asked)

    def _run(self, way: str, images: Float, asked: Asked) -> tuple[Finished, Ran]:
        """Runs a batch some way."""
        batch, limits = len(images), asked.limits
        if way == EXACT:
            return self._exact(images, limits)
        rooms = self._tables.rooms(asked.distinct, batch)
        with self.backend.lane(batch) as lane:
            lane.launch(images, limits, rooms, way)
            finished = lane.finish()
        over = np.flatnonzero(finished.state == OVERFLOWED)
        again = self._again(finished, over, images, limits) if len(over) else ()
        self._tables.note(asked.distinct, batch, finished.kept if len(over) else None)
        return finished, Ran(way, batch, rooms, len(over), again)

    def _exact(
        self,
        images: Float,
        limits: Float,
        follow: Policy | None = None,
        observe: Observer | None = None,
        start: int = 0,
    ) -> tuple[Finished, Ran]:
        """Runs a batch, block by block, each with as much room as it takes."""
        every_head = observe is not None  # who looks on sees every image once
        finished, rooms = self._pass(images, limits, follow, observe, start, every_head)
        over = np.flatnonzero(finished.state == OVERFLOWED)
        again = self._again(finished, over, images, limits, follow) if len(over) else ()
        return finished, Ran(EXACT, len(images), rooms, len(over), again)

    def _again(
        self,
        finished: Finished,
        over: npt.NDArray[np.int64],
        images: Float,
        limits: Float,
        follow: Policy | None = None,
    ) -> Rooms:
        """Runs some of a batch's images once more, exactly and with all heads; returns what blocks were given."""
        policy = None if follow is None else follow[over]
        found, rooms = self._pass(images[over], limits[:, over], policy, None, 0, True)
        finished.logits[over], finished.state[over] = found.logits, found.state
        finished.kept[:, over] = found.kept
        return rooms

    def _pass(
        self,
        images: Float,
        limits: Float,
        follow: Policy | None,
        observe: Observer | None,
        start: int,
        every_head: bool,
    ) -> tuple[Finished, Rooms]:
        """Runs images with the room that each block turns out to take; a policy that is followed tells beforehand."""
        kept = None if follow is None else np.concatenate(follow.masks(), 2).swapaxes(0, 1)
        known, taken = None if follow is None else rooms_of(follow), []
        with self.backend.lane(len(images)) as lane:
            lane.start(images, limits, kept, every_head)
            for block in range(self.arch.depth):
                if observe is not None:
                    self._show(observe, lane, block, limits[block], start)
                room: Room = known[block] if known else lane.room(block)
                lane.block(block, room)
                taken.append(room)
            finished = lane.finish()
            if observe is not None:
                for image, tokens in enumerate(lane.tokens(), start):
                    observe(Step(image, self.arch.depth, tokens, None, None))
        return finished, tuple(taken)

    def _show(self, observe: Observer, lane: Lane, block: int, limits: Float, start: int) -> None:
        """Shows every image before a block."""
        kinds = np.repeat([0, 1, 2], [self.arch.tokens, self.arch.heads, 2])[deciding_columns(self.arch, block)]
        decisions = lane.decisions(block)
        for image, (tokens, logits) in enumerate(zip(lane.tokens(), decisions, strict=True)):
            kept = logits > limits[image, kinds]
            if self.arch.token_policy:
                kept[0] = True
            observe(Step(start + image, block, tokens, logits, kept))

    def _check(self, finished: Finished, start: int) -> None:
        """Raises NotFiniteError where decisions or logits are not finite, BackendError where an image had no room."""
        if (bad := finished.state == NOT_FINITE).any():
            raise not_finite(f"the decisions on image {start + int(bad.argmax())}, or its last tokens, are")
        if (left := finished.state == OVERFLOWED).any():
            raise BackendError(
                f"image {start + int(left.argmax())} found no room with all that it asked for; export the bundle again"
            )
        check_logits(finished.logits, "the logits", start)
