"""The README's plot, of the rows that run.py measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import BIASES


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency against executed MACs, each relative to the dense twin's, with the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="ideal: time follows MACs")
    markers = {1: "o", 8: "s", 32: "^"}
    for number, (name, profile) in enumerate(BIASES):
        for row in (row for row in rows if (row["model"], row["profile"]) == (name, profile)):
            at = row["macs"]["executed_mean"] / row["macs"]["dense"], 1 / row["speedup"]
            first = row["backend"] == rows[0]["backend"]
            label = f"{name}, {profile}" if first and row["batch"] == rows[0]["batch"] else None
            filled = {} if first else {"markerfacecolor": "none"}
            axes.plot(*at, markers.get(row["batch"], "d"), color=f"C{number}", label=label, **filled)
            axes.annotate(str(row["batch"]), at, (5, -3), textcoords="offset points", fontsize="x-small")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.05), xlabel="executed MACs / dense MACs (numbers: batch)")
    axes.set_title("filled: " + ", hollow: ".join(dict.fromkeys(row["backend"] for row in rows)), fontsize="medium")
    axes.set_ylabel("latency / latency of the dense twin")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)
