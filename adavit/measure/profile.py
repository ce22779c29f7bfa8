"""A backend around another, which notes when every call of its slots began and ended."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from threading import get_ident
from time import perf_counter_ns
from typing import Any, Literal, NamedTuple

from adavit.architecture import Architecture
from adavit.bundle.keys import BlockKey
from adavit.runtime.backend import Backend, Float, Index, Slot, Usage
from adavit.runtime.batch import Room

__all__ = ["FETCH", "GRAPH", "Event", "ProfiledBackend", "Recorder", "block_part"]

COSTED = 1000
"""Calls without work, to see what noting one costs."""
GRAPH, FETCH = "graph", "fetch"
"""What a call of a slot does: it runs a graph, or brings values to the host and waits for them."""


class Event(NamedTuple):
    """A call of a slot, or a whole run.

    Attributes:
        name: for people.
        start, end: in nanoseconds.
        thread: that called.
        part: of the model that it belongs to: "stem", "block 3"; empty for a run.
        kind: GRAPH or FETCH; empty for a run.
        key: what a block ran, or None.
        kept: how many tokens a block kept.
        computed: how many it computed.
        room: what a block of a batch was given.
        heads: how many its graph has; None for all.
    """

    name: str
    start: int
    end: int
    thread: int
    part: str = ""
    kind: str = ""
    key: BlockKey | None = None
    kept: int = 0
    computed: int = 0
    room: Room | None = None
    heads: int | None = None


def block_part(block: int) -> str:
    """The name of a block as a part of the model."""
    return f"block {block}"


class Recorder:
    """Notes calls while it is recording."""

    def __init__(self) -> None:
        self._events: list[Event] | None = None

    @contextmanager
    def recording(self) -> Iterator[list[Event]]:
        """The calls that are made until the block ends, by any thread."""
        events: list[Event] = []
        self._events = events
        try:
            yield events
        finally:
            self._events = None

    def timed(self, about: Event, call: Callable[..., Any], *arguments: Any) -> Any:
        """Makes a call, and notes it as this event with its times and thread."""
        if (events := self._events) is None:
            return call(*arguments)
        start = perf_counter_ns()
        result = call(*arguments)
        events.append(about._replace(start=start, end=perf_counter_ns(), thread=get_ident()))
        return result

    def cost(self) -> float:
        """Nanoseconds that it takes to note a call."""
        with self.recording() as events:
            for _ in range(COSTED):
                self.timed(Event("nothing", 0, 0, 0), int)
        return median(later.end - earlier.end for earlier, later in pairwise(events))


class ProfiledBackend(Recorder):
    """Passes everything on to a backend, and notes the calls of its slots while it is recording.

    Args:
        arch: the model's shapes.
        backend: does the work.
    """

    on_host: Literal[True] = True

    def __init__(self, arch: Architecture, backend: Backend) -> None:
        super().__init__()
        self.name, self.arch = backend.name, arch
        self._backend = backend

    def slot(self, threads: int) -> Slot:
        """See `Backend.slot`."""
        return ProfiledSlot(self, self._backend.slot(threads))

    def dense(self, images: Float) -> Float:
        """See `Backend.dense`."""
        return self._backend.dense(images)

    def choose(self, usage: Usage) -> Sequence[Hashable]:
        """See `Backend.choose`."""
        return self._backend.choose(usage)

    def prepare(self, wanted: Hashable) -> None:
        """See `Backend.prepare`."""
        self._backend.prepare(wanted)

    def retain(self, wanted: Sequence[Hashable]) -> None:
        """See `Backend.retain`."""
        self._backend.retain(wanted)

    def prepared(self) -> Sequence[Hashable]:
        """See `Backend.prepared`."""
        return self._backend.prepared()

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`."""
        return self._backend.rounded(tokens)

    def timings(self) -> dict[str, float]:
        """See `Backend.timings`."""
        return self._backend.timings()

    def versions(self) -> dict[str, str]:
        """See `Backend.versions`."""
        return self._backend.versions()


class ProfiledSlot:
    """A slot whose calls are noted.

    Args:
        backend: notes them.
        slot: does the work.
    """

    def __init__(self, backend: ProfiledBackend, slot: Slot) -> None:
        self._backend, self._slot = backend, slot
        self._part = "stem"
        self._next = 0

    def stem(self, image: Float) -> None:
        """See `Slot.stem`."""
        self._part, self._next = "stem", 0
        self._backend.timed(Event("stem", 0, 0, 0, "stem", GRAPH), self._slot.stem, image)

    def block(self, key: BlockKey, tokens: Index) -> None:
        """See `Slot.block`."""
        self._part, self._next = block_part(key.block), key.block + 1
        name, kept = f"blocks.{key.block}.{key.sublayers.name}", len(tokens)
        event = Event(name, 0, 0, 0, self._part, GRAPH, key, kept, self._backend.rounded(kept))
        self._backend.timed(event, self._slot.block, key, tokens)

    def decisions(self) -> Float:
        """See `Slot.decisions`; they belong to the block that is to come."""
        return self._fetched("fetch decisions", block_part(self._next), self._slot.decisions)

    def logits(self) -> Float:
        """See `Slot.logits`."""
        return self._fetched("fetch logits", self._part, self._slot.logits)

    def tokens(self) -> Float:
        """See `Slot.tokens`."""
        return self._fetched("fetch tokens", self._part, self._slot.tokens)

    def _fetched(self, name: str, part: str, call: Callable[[], Float]) -> Float:
        found: Float = self._backend.timed(Event(name, 0, 0, 0, part, FETCH), call)
        return found
