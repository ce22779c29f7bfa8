"""The model card of a bundle, `README.md`: its metadata, and its operating points."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adavit.bundle.operating_points import TRAINED, Budgets, OperatingPoint
from adavit.files import write_beside
from adavit.reading import read_regular

__all__ = ["CARD", "front_matter", "points_section", "renew_points"]

CARD = "README.md"
MAX_CARD = 16 << 20
HEADING = "## Operating points"
SECTION = re.compile(rf"\n*^{HEADING}\n.*?(?=^#|\Z)", re.MULTILINE | re.DOTALL)


def front_matter(metadata: Mapping[str, Any]) -> str:
    """The lines at the top of a card that the Hugging Face Hub reads: YAML, each value as JSON, which YAML includes."""
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in metadata.items()), "---", ""])


def points_section(budgets: Budgets) -> str:
    """What a card says of operating points, and what they were measured on."""
    labelled = all("accuracy" in point.measured for point in budgets.points)
    measured, column = ("accuracy", "accuracy") if labelled else ("agreement", "same class as the trained policy")
    rows = [_row(point, measured) for point in budgets.points]
    return "\n".join(
        [
            HEADING,
            "",
            f"Measured on the {budgets.calibration['images']:,} calibration images that the points were chosen on. "
            "This is not a benchmark.",
            "",
            f"| budget | MACs | {column} |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def renew_points(folder: Path, budgets: Budgets) -> None:
    """Puts operating points into the card of the bundle `folder`, in the place of those it had.

    The rest of the card stays as it is. A bundle without a card stays without one.
    """
    path = folder / CARD
    try:
        text = read_regular(path, MAX_CARD).decode()
    except (OSError, UnicodeDecodeError):  # people read it, programs don't
        return
    found = SECTION.search(text)
    start, end = found.span() if found else (len(text), len(text))
    rest = text[end:]
    parts = [text[:start].rstrip("\n") + "\n", points_section(budgets), *([rest] if rest else [])]
    with write_beside(path) as file:
        file.write("\n".join(parts).encode())


def _row(point: OperatingPoint, measured: str) -> str:
    name = f"{point.budget:g}{', as trained' if point.offsets == TRAINED else ''}"
    return f"| {name} | {point.measured['macs']:.1%} | {point.measured[measured]:.1%} |".replace("%", " %")
