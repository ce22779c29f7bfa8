"""Draws what gpu_model.py predicts; predicts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"exact": "#0072B2", "capacity": "#D55E00", "conditional": "#009E73"}
MARKERS = {"exact": "o", "capacity": "s", "conditional": "^"}
MODELS = {"t2t_vit_19": "T2T-ViT-19", "deit_small": "DeiT-S"}

Row = dict[str, Any]


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """One profile and batch size: a line for each GPU, with the speedup of each way."""
    axes.axvspan(0.01, 1, color="0.93", zorder=0)
    axes.axvline(1, color="0.45", linewidth=1.2, zorder=1)
    for place, row in enumerate(reversed(rows)):
        axes.plot(row["speedup_range"], (place, place), color="0.7", linewidth=5, solid_capstyle="round", zorder=2)
        for way, colour in COLOURS.items():
            speedup = row["ms"]["dense"] / row["ms"][way]
            style = {"color": colour, "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot(speedup, place, MARKERS[way], zorder=3, **style)
    axes.set_yticks(range(len(rows)), [row["gpu"] for row in reversed(rows)])
    axes.set_xscale("log")
    axes.set_xticks([0.25, 0.5, 1, 2], ["0.25x", "0.5x", "1x", "2x"])
    axes.minorticks_off()
    axes.grid(axis="x", color="0.85", zorder=0)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Speedups over the dense engine, by profile and batch size, of the first model among the rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    model = rows[0]["model"]
    rows = [row for row in rows if row["model"] == model]
    profiles, batches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("profile", "batch"))
    figure, panels = pyplot.subplots(
        len(profiles), len(batches), figsize=(9.5, 5.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for line, profile in zip(panels, profiles, strict=True):
        for axes, batch in zip(line, batches, strict=True):
            shown = [row for row in rows if (row["profile"], row["batch"]) == (profile, batch)]
            draw(axes, shown)
            images = "single images" if batch == 1 else f"batch of {batch}"
            axes.set_title(f"{profile}, {images}", fontsize="medium")
    lowest = min(row["ms"]["dense"] / ms for row in rows for ms in row["ms"].values())
    highest = max(row["ms"]["dense"] / ms for row in rows for ms in row["ms"].values())
    panels[0, 0].set_xlim(0.85 * lowest, 1.15 * max(highest, *(row["speedup_range"][1] for row in rows)))
    precision = rows[0]["precision"]
    figure.suptitle(f"{MODELS[model]}, {precision}: a model of the time, not a measurement", fontweight="bold")
    panels[-1, len(batches) // 2].set_xlabel("speedup over the dense engine, which is faster in the grey area")
    style = {"linestyle": "", "markersize": 7}
    handles = [Line2D([], [], color=colour, marker=MARKERS[way], **style) for way, colour in COLOURS.items()]
    handles.append(Line2D([], [], color="0.7", linewidth=5))
    labels = [*COLOURS, "the best way, if small kernels take half or twice the time"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
