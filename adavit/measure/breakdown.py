"""Where the time of runs goes, by part of the model; all of it is counted, so that it adds up to the latency."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from adavit.measure.profile import Event

__all__ = ["BETWEEN", "IDLE", "Breakdown"]

IDLE = "idle threads"
"""The part that stands for workers without an image."""
BETWEEN = "calls"
"""The kind that stands for all time between calls of the backend."""


@dataclass(frozen=True)
class Breakdown:
    """Where time went. While w workers run a batch's images, each of them counts 1/w.

    Attributes:
        workers: images that run at once.
        sums: nanoseconds by part of the model ("stem", "block 3", `IDLE`) and kind: that of an event, or `BETWEEN`.
    """

    workers: int
    sums: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def add(self, run: Event, calls: list[Event]) -> None:
        """Adds one run, with the calls of the backend in it."""
        threads: dict[int, list[Event]] = defaultdict(list)
        for event in calls:
            threads[event.thread].append(event)
        asking = threads.pop(run.thread, [])
        self._walk(asking, run.start, run.end, 1.0, "stem", list(threads.values()))

    def _walk(
        self, events: list[Event], start: int, end: int, weight: float, part: str, workers: list[list[Event]]
    ) -> None:
        """Adds a thread's time from start to end; where it waits for workers, theirs."""
        for event in events:
            part = event.part
            self._between(start, event.start, weight, part, workers)
            self.sums[part, event.kind] += weight * (event.end - event.start)
            start = event.end
        self._between(start, end, weight, part, workers)

    def _between(self, start: int, end: int, weight: float, part: str, workers: list[list[Event]]) -> None:
        busy = [events for events in workers if start <= events[0].start < end]
        if not busy:
            self.sums[part, BETWEEN] += weight * (end - start)
            return
        share = weight / self.workers
        for events in busy:
            self._walk(events, start, events[-1].end, share, part, [])
        idle = self.workers * (end - start) - sum(events[-1].end - start for events in busy)
        self.sums[IDLE, BETWEEN] += share * idle
