"""What a run says: a JSON-lines log, and one line of progress on a terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from adavit.files import write_beside

__all__ = ["Log", "Progress", "read_log"]

Record = dict[str, Any]


def read_log(path: Path) -> list[Record]:
    """The records of a log; a last line that a kill cut short is left out."""
    records: list[Record] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Log:
    """Appends records, one JSON object a line; those at or after `step` are dropped first, to resume there."""

    def __init__(self, path: Path, step: int) -> None:
        kept = "".join(json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= step)
        with write_beside(path) as file:
            file.write(kept.encode())
        self._path = path

    def write(self, record: Record) -> None:
        """Adds one record, which has a "step"."""
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Progress:
    """One rewritten line with the time left, where standard error is a terminal; else nothing."""

    def __init__(self, first: int, steps: int, shown: bool) -> None:
        self._first, self._steps = first, steps
        self._start = time.monotonic()
        self._shown = shown and sys.stderr.isatty()

    def update(self, step: int, words: str) -> None:
        """After `step` steps."""
        if self._shown:
            spent, done = time.monotonic() - self._start, max(1, step - self._first)
            left = round(spent / done * (self._steps - step))
            print(f"\rstep {step}/{self._steps}  {words}  {_clock(left)} left ", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self._shown:
            print(file=sys.stderr)


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
