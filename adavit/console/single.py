"""`adavit-export --single-file`: options that it refuses, and what it prints."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from adavit.console.options.export import EXPORTING
from adavit.console.precision import calibration_lines, checked_line, differs_line
from adavit.tensorrt.options import BuildOptions

__all__ = ["NEVER", "OF_CHECKPOINTS", "single_lines"]

NEVER = (
    "output",
    "check",
    "against",
    "with_dense",
    "opset",
    "max_drop",
    *(field.name for field in fields(BuildOptions)),
)
"""Options of a bundle that a single file does not have."""
CALIBRATING = {"precisions", "calibration_cache", "samples", "method", "seed"}
OF_CHECKPOINTS = {*EXPORTING, "heads", "budgets", "budget_images"} - {*CALIBRATING, "verify", "force"}
"""Options that only the export of a checkpoint follows."""
ADVICE = "calibrate on more images, try another --method, or take --weights fp16"


def single_lines(report: dict[str, Any]) -> list[str]:
    """The summary of a single file."""
    stored = report["precision"] if report["precision"] == report["weights"] else f"weights in {report['weights']}"
    lines = [f"file        {report['file']}: {report['bytes'] / 1e6:.1f} MB, {stored}, opset {report['opset']}"]
    lines += [f"beside it   {report[key]}" for key in ("json", "ort") if key in report]
    budget = report["budget"]
    if budget["input"]:
        lines.append(f"budgets     {budget['least']:.4g} to {budget['most']:.4g}; 0 is the trained policy")
    elif budget["baked"]:
        lines.append(f"budget      {budget['baked']:.4g}")
    blocks = report["blocks"]
    if any(blocks.values()):
        sets = f", {blocks['constant_head_sets']} constant head sets" if blocks["constant_head_sets"] else ""
        lines.append(f"heads       masked in {blocks['masked']} blocks, gathered in {blocks['gathered']}{sets}")
    if found := report["verified"]:
        same = found["decisions"] - found["differing_decisions"]
        lines.append(
            f"verified    {found['images']} images: {same} of {found['decisions']} decisions identical, "
            f"largest logit difference {found['max_logit_difference']:.1e}"
        )
    if checked := report["checked"]:
        lines += [checked_line(_point(point["budget"], report), point, checked["input"]) for point in checked["points"]]
        lines += [differs_line(report["precision"], ADVICE)] if checked["differs"] else []
    for calibrated in (report["calibration"] or {}).values():
        lines += calibration_lines(calibrated)
    return [*lines, f"took        {report['seconds']:.1f} s"]


def _point(budget: float | None, report: dict[str, Any]) -> str:
    """What an operating point's line begins with."""
    if not report["budget"]["input"]:
        return str(report["precision"])
    return "trained" if budget is None else f"at {budget:.4g}"
