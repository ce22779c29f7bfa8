"""Plots: a run's log, and what an evaluation found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adavit.files import write_beside

__all__ = ["plot_evaluation", "plot_log"]

KINDS = ("tokens", "heads", "sublayers")
Record = dict[str, Any]


def plot_log(records: Sequence[Record], path: Path) -> None:
    """Loss, accuracy and usages over the steps, as a PNG."""
    figure, axes = _axes(3)
    _line(axes[0], records, "loss")
    _line(axes[1], records, "accuracy")
    for name in (*KINDS, "macs"):
        _line(axes[2], records, name)
    for axis, title in zip(axes, ("training loss", "test accuracy", "usage at inference"), strict=True):
        axis.set(title=title, xlabel="step")
    if axes[2].lines:
        axes[2].legend()
    _write(figure, path)


def plot_evaluation(report: Record, path: Path) -> None:
    """Accuracy against MACs, MACs by class and by difficulty, and usage by block, as a PNG."""
    figure, axes = _axes(4)
    _points(axes[3], report)
    classes = sorted(report["classes"], key=lambda row: row["macs"])
    axes[0].barh([row["name"] for row in classes], [row["macs"] for row in classes])
    axes[0].set(title="MACs by class (share of dense)")
    parts = report["difficulty"]["parts"]
    axes[1].bar([str(i + 1) for i in range(len(parts))], [part["macs"] for part in parts])
    axes[1].set(title=f"MACs from easy to hard ({report['difficulty']['by']})")
    for kind in KINDS:
        axes[2].plot([block[kind] for block in report["blocks"]], marker="o", label=kind)
    axes[2].set(title="choices by block", xlabel="block", ylim=(0, 1.05))
    axes[2].legend()
    _write(figure, path)


def _points(axis: Any, report: Record) -> None:
    """The model among those it is compared with."""
    points: dict[str, Record] = {"adaptive": report}
    points |= {name: report[name] for name in ("random_policy", "baseline") if name in report}
    if "dense" in report:
        points["dense"] = {"macs": 1.0, **report["dense"]}
    for name, point in points.items():
        axis.plot(point["macs"], point["accuracy"], "o", label=name.replace("_", " "))
    axis.set(title="accuracy against MACs (share of dense)", xlim=(0, 1.05))
    axis.legend()


def _axes(count: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * count, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count)


def _line(axis: Any, records: Sequence[Record], name: str) -> None:
    points = [(record["step"], record[name]) for record in records if name in record]
    if points:
        axis.plot(*zip(*points, strict=True), label=name)


def _write(figure: Any, path: Path) -> None:
    with write_beside(path) as file:
        figure.savefig(file, format="png", dpi=120)
