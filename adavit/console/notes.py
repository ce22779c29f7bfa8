"""What the commands note of images: what was left out, and how labels were matched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from adavit.console.output import in_flags
from adavit.errors import bounded

__all__ = ["echo_notes", "export_notes"]


def echo_notes(command: str, notes: Iterable[str]) -> None:
    """Prints notes on stderr, each once."""
    for note in dict.fromkeys(notes):
        click.echo(f"{command}: note: {bounded(in_flags(note))}", err=True)


def export_notes(report: dict[str, Any]) -> list[str]:
    """What an export notes of its checkpoint, and of the images that it was calibrated on."""
    parts = (report, *(report.get("calibration") or {}).values(), report.get("budgets"))
    return [note for part in parts if part for note in part.get("notes", ())]
