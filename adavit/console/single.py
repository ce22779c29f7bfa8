"""`adavit-export --single-file`: options that it refuses, and what it prints."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from adavit.console.options.export import EXPORTING
from adavit.console.output import table
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
        lines += _checked_lines(report["precision"], checked)
        lines += [differs_line(report["precision"], ADVICE)] if checked["differs"] else []
    for calibrated in (report["calibration"] or {}).values():
        lines += calibration_lines(calibrated)
    return [*lines, f"took        {report['seconds']:.1f} s"]


def _checked_lines(precision: str, checked: dict[str, Any]) -> list[str]:
    """How the file's decisions differ from fp32's, at its operating points."""
    points = checked["points"]
    if len(points) == 1:
        return [checked_line(precision, points[0], checked["input"])]
    rows: list[tuple[str, ...]] = [("budget", "flipped", "same class", "logits differ by")]
    for point in points:
        free, budget = point["free"], "trained" if point["budget"] is None else f"{point['budget']:.4g}"
        row = budget, f"{free['flipped']:.2%}", f"{free['top1_agreement']:.1%}", f"{free['mean_logit_difference']:.2g}"
        rows.append(row)
    if points[0]["accuracy"]:
        accuracies = [tuple(f"{point['accuracy'][name]:.1%}" for name in ("second", "first")) for point in points]
        rows = [row + more for row, more in zip(rows, [("accuracy", "of fp32"), *accuracies], strict=True)]
    head = f"{precision:<11} {points[0]['images']} {checked['input']}, against fp32, at each budget:"
    return [head, "", *table(rows), ""]
