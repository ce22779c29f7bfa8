"""A backend on a device around another, which notes when every call of its lanes began and ended.

Running a graph is enqueuing it; what it takes on the device shows in the fetch that waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from adavit.measure.profile import FETCH, GRAPH, Event, Recorder, block_part
from adavit.runtime.batch import BatchBackend, Bool, Finished, Float, Lane, Room, Rooms

__all__ = ["ProfiledBatches"]


class ProfiledBatches(Recorder):
    """Passes everything on to a backend, and notes the calls of its lanes while it is recording.

    Args:
        backend: does the work.
    """

    on_host: Literal[False] = False

    def __init__(self, backend: BatchBackend) -> None:
        super().__init__()
        self._backend, self.name, self.most_images = backend, backend.name, backend.most_images
        self.usual_heads = backend.usual_heads

    @contextmanager
    def lane(self, batch: int) -> Iterator[Lane]:
        """See `BatchBackend.lane`."""
        with self._backend.lane(batch) as lane:
            yield ProfiledLane(self, lane, self.usual_heads)

    def why_not(self, way: str) -> str | None:
        """See `BatchBackend.why_not`."""
        return self._backend.why_not(way)

    def dense(self, images: Float) -> Float:
        """See `BatchBackend.dense`."""
        return self._backend.dense(images)

    def timings(self) -> Mapping[str, float]:
        """See `BatchBackend.timings`."""
        return self._backend.timings()

    def versions(self) -> dict[str, str]:
        """See `BatchBackend.versions`."""
        return self._backend.versions()


class ProfiledLane:
    """A lane whose calls are noted.

    Args:
        recorder: notes them.
        lane: does the work.
        usual_heads: for each block, the heads that its engine has, where not every head is asked for.
    """

    def __init__(self, recorder: Recorder, lane: Lane, usual_heads: tuple[tuple[int, ...], ...] | None) -> None:
        self._recorder, self._lane, self._usual_heads = recorder, lane, usual_heads
        self._part, self._every_head = "stem", False

    def start(self, images: Float, limits: Float, kept: Bool | None, every_head: bool) -> None:
        """See `Lane.start`."""
        self._every_head = every_head
        event = Event("stem", 0, 0, 0, "stem", GRAPH)
        self._recorder.timed(event, self._lane.start, images, limits, kept, every_head)

    def room(self, block: int) -> Room:
        """See `Lane.room`."""
        event = Event("fetch sizes", 0, 0, 0, block_part(block), FETCH)
        found: Room = self._recorder.timed(event, self._lane.room, block)
        return found

    def block(self, block: int, room: Room) -> None:
        """See `Lane.block`."""
        self._part = block_part(block)
        usual = self._usual_heads if not self._every_head else None
        heads = len(usual[block]) if usual else None
        event = Event(f"blocks.{block}", 0, 0, 0, self._part, GRAPH, room=room, heads=heads)
        self._recorder.timed(event, self._lane.block, block, room)

    def decisions(self, block: int) -> Float:
        """See `Lane.decisions`."""
        return self._lane.decisions(block)

    def tokens(self) -> Float:
        """See `Lane.tokens`."""
        return self._lane.tokens()

    def launch(self, images: Float, limits: Float, rooms: Rooms, way: str) -> None:
        """See `Lane.launch`."""
        self._lane.launch(images, limits, rooms, way)

    def finish(self) -> Finished:
        """See `Lane.finish`."""
        event = Event("fetch logits", 0, 0, 0, self._part, FETCH)
        found: Finished = self._recorder.timed(event, self._lane.finish)
        return found
