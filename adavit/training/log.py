"""What a run says: a JSON-lines log, and its progress."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adavit.files import write_beside
from adavit.training.errors import TrainingError

__all__ = ["Log", "Progress", "Record", "Reporter", "counted", "read_log", "silent"]

Record = dict[str, Any]
Progress = Callable[[str, float], None]
"""Told a stage and the share of it that is done."""


def counted(count: int, noun: str) -> str:
    """A number of things: "1 image", "1,024 images"."""
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def silent(*_: object) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Reporter:
    """Whom a run tells how far it is.

    Attributes:
        progress: gets a stage and the share done.
        say: gets lines to read.
    """

    progress: Progress = silent
    say: Callable[[str], None] = silent


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
