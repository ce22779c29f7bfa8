"""Latency against executed MACs, from what run.py measured: python benchmarks/latency_plot.py results.json latency.png

Measures nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MODELS = {"t2t_vit_19": "T2T-ViT-19", "deit_small": "DeiT-S"}
SERIES = {
    ("t2t_vit_19", "published"): ("#0072B2", (-4, 4), "right", "bottom"),
    ("t2t_vit_19", "token-heavy"): ("#D55E00", (6, 5), "left", "top"),
    ("deit_small", "published"): ("#009E73", (-4, 4), "right", "bottom"),
    ("deit_small", "token-heavy"): ("#CC79A7", (-7, 0), "right", "center"),
}
"""By model and profile: a colour of Okabe and Ito, which people with colour blindness can tell apart; and of the label
the distance in points and the alignment. It stands at the fastest batch size for "top", else at the slowest."""
MARKERS = {1: "o", 8: "s", 32: "^"}
BACKENDS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}

Row = dict[str, Any]


def share(row: Row) -> float:
    """Executed MACs, in percent of the dense ones."""
    return float(100 * row["macs"]["executed_mean"] / row["macs"]["dense"])


def time(row: Row) -> float:
    """Latency, in percent of the dense twin's."""
    return 100 / float(row["speedup"])


def span(values: list[float]) -> str:
    """From the least to the largest."""
    return f"{min(values):.0f} to {max(values):.0f} %"


def draw(axes: Any, rows: list[Row]) -> None:
    """One backend: a line for each model and profile, through its batch sizes."""
    axes.plot([0, 100], [0, 100], color="0.45", linestyle="--", linewidth=1.2, zorder=1)
    axes.annotate("ideal", (54.5, 54.5), (4, -14), textcoords="offset points", color="0.35", ha="center")
    for (model, profile), (colour, distance, across, along) in SERIES.items():
        line = [row for row in rows if (row["model"], row["profile"]) == (model, profile)]
        if not line:
            continue
        axes.plot([share(row) for row in line], [time(row) for row in line], color=colour, linewidth=1.2, zorder=3)
        for row in line:
            style = {"color": colour, "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.7}
            axes.plot(share(row), time(row), MARKERS.get(row["batch"], "D"), zorder=4, **style)
        at = (min if along == "top" else max)(line, key=time)
        style = {"color": "0.15", "fontsize": "small", "ha": across, "va": along}
        where = {"xytext": distance, "textcoords": "offset points"}
        axes.annotate(f"{MODELS[model]}\n{profile}", (share(at), time(at)), **style, **where)
    precision = PRECISIONS[rows[0]["versions"].get("precision", "fp32")]
    found = f"{span(list(map(share, rows)))} of the MACs\ntake {span(list(map(time, rows)))} of the time"
    axes.set_title(f"{BACKENDS[rows[0]['backend']]}, {precision}: {found}", fontsize="medium")
    axes.set(xlim=(15, 60), ylim=(15, 75), xlabel="executed MACs, % of the dense twin's")
    axes.grid(color="0.92")


def plot(rows: list[Row], path: Path) -> None:
    """Latency against executed MACs of the full-size models, each relative to the dense twin's, by backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    shown = [row for row in rows if row["policy"] == "own" and row["prepared"] and row["model"] in MODELS]
    backends = list(dict.fromkeys(row["backend"] for row in shown))
    figure, panels = pyplot.subplots(
        1, len(backends), figsize=(0.6 + 4 * len(backends), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, backend in zip(panels[0], backends, strict=True):
        draw(axes, [row for row in shown if row["backend"] == backend])
    panels[0, 0].set_ylabel("latency, % of the dense twin's")
    figure.suptitle("Saved MACs are saved milliseconds", fontsize="large", fontweight="bold")
    batches = sorted({row["batch"] for row in shown})
    handles = [Line2D([], [], color="0.35", marker=MARKERS.get(batch, "D"), linestyle="") for batch in batches]
    labels = ["single images" if batch == 1 else f"batch of {batch}" for batch in batches]
    panels[0, -1].legend(handles, labels, loc="lower right", handletextpad=0.2)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Draws the plot of results that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    plot(json.loads(arguments.results.read_text(encoding="utf-8"))["rows"], arguments.output)


if __name__ == "__main__":
    main()
