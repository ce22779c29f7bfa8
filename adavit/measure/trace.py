"""Traces in Chrome's format, which Perfetto (ui.perfetto.dev) opens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adavit.files import write_beside
from adavit.measure.profile import Event

__all__ = ["write_trace"]


def write_trace(path: Path, title: str, events: Sequence[Event]) -> None:
    """Writes events, each as a complete event on the track of its thread.

    Args:
        path: a JSON file, replaced whole.
        title: what ran.
        events: nested or apart on each thread; times begin at the earliest.
    """
    process, first = os.getpid(), min((event.start for event in events), default=0)
    threads = list(dict.fromkeys(event.thread for event in sorted(events, key=lambda event: event.start)))
    written: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": title}},
        *(
            {"ph": "M", "name": "thread_name", "pid": process, "tid": tid, "args": {"name": f"thread {tid}"}}
            for tid, _ in enumerate(threads, 1)
        ),
    ]
    for event in events:
        written.append(
            {
                "ph": "X",
                "name": event.name,
                "cat": event.kind or "run",
                "ts": (event.start - first) / 1e3,
                "dur": (event.end - event.start) / 1e3,
                "pid": process,
                "tid": 1 + threads.index(event.thread),
                "args": {} if event.key is None else {"tokens": event.computed, "heads": len(event.key.heads)},
            }
        )
    with write_beside(path.resolve()) as file:
        file.write(json.dumps({"traceEvents": written, "displayTimeUnit": "ms"}).encode())
