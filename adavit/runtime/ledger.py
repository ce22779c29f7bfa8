"""Books the time between the calls of a backend, so that what is booked adds up to the latency."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from adavit.runtime.profile import Event

__all__ = ["IDLE", "Ledger", "part_of"]

IDLE = "idle threads"
MOVES = ("gather", "scatter", "add", "fetch")


def part_of(event: Event) -> str | None:
    """The part of the model that an engine belongs to; None for a move, which belongs to the engine before it."""
    names = event.name.split(".")
    if names[0] == "blocks":
        return f"block {names[1]}"
    return None if event.name in MOVES else event.name.removesuffix("_set")


def kind_of(event: Event, part: str) -> str:
    """What the time of a call counts as."""
    if event.name.endswith((".decide", ".decide_set")) or (event.name == "fetch" and part.startswith("block")):
        return "decision"
    return "moves" if event.name in MOVES or event.name.endswith("_weights") else "engines"


@dataclass(frozen=True)
class Ledger:
    """Where time went. While w workers run a batch's images, each of them counts 1/w.

    Attributes:
        workers: images that run at once.
        call: nanoseconds that a call of an engine takes without any work.
        sums: nanoseconds by part of the model ("stem", "block 3", "head", `IDLE`) and kind: "engines", "decision",
            "moves" for copies of rows and weights, "calls" for all between, calls themselves included.
    """

    workers: int
    call: float
    sums: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def book(self, run: Event, calls: list[Event]) -> None:
        """Books one run, with the calls of the backend in it."""
        threads: dict[int, list[Event]] = defaultdict(list)
        for event in calls:
            threads[event.thread].append(event)
        asking = threads.pop(run.thread, [])
        self._walk(asking, run.start, run.end, 1.0, "stem", list(threads.values()))

    def _walk(
        self, events: list[Event], start: int, end: int, weight: float, part: str, workers: list[list[Event]]
    ) -> None:
        """Books a thread's time from start to end; where it waits for workers, theirs."""
        for event in events:
            part = part_of(event) or part
            self._between(start, event.start, weight, part, workers)
            kind, spent = kind_of(event, part), event.end - event.start
            call = min(self.call, spent) if kind != "moves" and event.name not in MOVES else 0.0
            self.sums[part, kind] += weight * (spent - call)
            self.sums[part, "calls"] += weight * call
            start = event.end
        self._between(start, end, weight, part, workers)

    def _between(self, start: int, end: int, weight: float, part: str, workers: list[list[Event]]) -> None:
        busy = [events for events in workers if start <= events[0].start < end]
        if not busy:
            self.sums[part, "calls"] += weight * (end - start)
            return
        share = weight / self.workers
        for events in busy:
            self._walk(events, start, events[-1].end, share, part, [])
        idle = self.workers * (end - start) - sum(events[-1].end - start for events in busy)
        self.sums[IDLE, "calls"] += share * idle
