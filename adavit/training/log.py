"""What a run says: a JSON-lines log, and one line of progress on a terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from adavit.files import write_beside
from adavit.training.errors import TrainingError

__all__ = ["Log", "Progress", "read_log"]

Record = dict[str, Any]


def read_log(path: Path) -> list[Record]:
    """The records of a log.

    Raises:
        TrainingError: it is damaged, but for a last line that a kill cut short, which is left out.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("a step is a whole number")
        except (ValueError, TypeError, KeyError, RecursionError):
            if number == len(lines):
                break
            raise TrainingError(f"{path}: line {number} is damaged; mend it, or move the file away") from None
        records.append(record)
    return records


class Log:
    """Appends records, one JSON object a line; those after `step` are dropped first, to resume there."""

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
