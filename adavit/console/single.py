"""`adavit-export --single-file`: what it asks for and prints."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from adavit.bundle.bundle import is_bundle
from adavit.bundle.demo import names_demo
from adavit.calibration.options import BudgetOptions, CalibrationOptions
from adavit.console import output as console
from adavit.console.options.export import EXPORTING
from adavit.console.options.refuse import refuse
from adavit.console.stages import single_stages
from adavit.tensorrt.options import BuildOptions

__all__ = ["export_single", "single_lines"]

NEVER = ("output", "check", "against", "with_dense", "opset", *(field.name for field in fields(BuildOptions)))
"""Options of a bundle that a single file does not have."""
OF_FILES = ("precisions", "verify", "force")
"""Options of an export that a single file of a bundle has too."""


def export_single(source: Path | None, target: Path, threads: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """Writes the file that is asked for, and returns the report."""
    if source is None:
        raise click.UsageError("give a BUNDLE or a CHECKPOINT for --single-file")
    refuse(NEVER, "to write a single file, leave out")
    given = names_demo(source) or is_bundle(source)
    if given:
        names = {*EXPORTING, "heads", "budgets", "budget_images"} - {*OF_FILES}
        refuse(names, "to write a single file of a BUNDLE, leave out")
    if len(options["precisions"]) > 1:
        raise click.UsageError("a single file has one --precision; write a file for each")
    calibration = CalibrationOptions.taken_from(options)
    build, budgets = BuildOptions.taken_from(options), BudgetOptions.taken_from(options)
    with console.Progress(single_stages(given, options["verify"], calibration, budgets)) as progress:
        from adavit.export import ExportOptions, SingleFileOptions, export_single_file

        single = SingleFileOptions.taken_from(
            options,
            precision=calibration.precisions[0],
            calibration_images=calibration.calibration_images,
            labels_by_order=calibration.labels_by_order,
            verify=options["verify"],
            force=options["force"],
            threads=threads,
        )
        export = ExportOptions(**options, build=build, budgets=budgets, calibration=calibration, threads=threads)
        return export_single_file(source, target, single, export, progress)


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
    return [*lines, f"took        {report['seconds']:.1f} s"]
