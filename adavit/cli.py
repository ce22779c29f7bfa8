"""The commands `adavit-export` and `adavit-run`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import click

from adavit.bundle.bundle import is_bundle
from adavit.bundle.demo import names_demo
from adavit.calibration.options import BudgetOptions, CalibrationOptions
from adavit.console import output as console
from adavit.console.notes import echo_notes, export_notes
from adavit.console.options.export import CALIBRATION_IMAGES, EXPORT_EXAMPLES, EXPORTING, export_options
from adavit.console.options.refuse import refuse
from adavit.console.options.run import OPERATING, RUN_EXAMPLES, run_options
from adavit.console.options.single import SINGLE
from adavit.console.precision import compare_lines, precision_lines
from adavit.console.progress import Stage
from adavit.console.run import run_lines
from adavit.console.single import NEVER, OF_CHECKPOINTS, single_lines
from adavit.console.stages import (
    adding_stages,
    checking_stages,
    comparing_stages,
    exporting_stages,
    running_stages,
    single_stages,
)
from adavit.files import find_folder
from adavit.tensorrt.options import BuildOptions
from adavit.version import __version__

PATH = click.Path(path_type=Path)


@click.command(cls=console.Command, name="adavit-export", epilog=EXPORT_EXAMPLES)
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=PATH, required=False)
@export_options
@click.version_option(__version__)
def export(
    source: Path | None,
    output: Path | None,
    check: Path | None,
    against: Path | None,
    single_file: Path | None,
    json_file: str | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Turn a trained AdaViT into a bundle of graphs, and prove that it computes the same.

    CHECKPOINT is a training checkpoint, a state dict or a safetensors file, whatever its name. `demo` is the small
    Fashion-MNIST model that comes with this package.

    Given a BUNDLE, --target adds TensorRT engines to it, --budgets operating points, and --calibration-images alone the
    statistics of what policies keep.

    Of either, --single-file writes one ONNX file, for an ONNX Runtime in any language.
    """
    console.check_targets({"--json": json_file})
    if single_file is not None:
        _print(_export_single(source, single_file, json_file, threads, options), json_file, single_lines)
        return
    refuse(SINGLE, "without --single-file, leave out")
    for name in SINGLE:
        del options[name]
    calibration = CalibrationOptions.taken_from(options)
    build, budgets = BuildOptions.taken_from(options), BudgetOptions.taken_from(options)
    recorded = budgets.calibration_images and output is None and check is None
    added = source if build.target or budgets.budgets or recorded else None
    if added is not None and output is None and check is None and names_demo(added):
        raise click.UsageError("the demo's bundle stays as it is; give --output BUNDLE, for a bundle of your own")
    to_bundle = added is not None and (find_folder(added) / "config.json").is_file()
    if added is not None and not to_bundle and output is None and check is None:
        raise click.UsageError(f"{added} is no bundle to add to; give a BUNDLE, or a CHECKPOINT and --output BUNDLE")
    if check is not None:
        stages = checking_stages()
    elif to_bundle:
        stages = adding_stages(budgets, build)
    else:
        stages = exporting_stages(options["verify"], calibration, budgets, build)
    with console.Progress(stages) as progress:
        if to_bundle and source is not None:
            if output is not None or check is not None:
                raise click.UsageError("to add to a BUNDLE, leave out --output and --check")
            refuse({*EXPORTING, "heads", "against"}, "to add to a BUNDLE, leave out")
            report = _add(source, build, budgets, threads, progress)
        else:
            options |= {"build": build, "budgets": budgets, "calibration": calibration}
            report = _export(source, output, check, against, threads, options, progress)
    _print(report, json_file, _export_lines)


def _print(report: dict[str, Any], json_file: str | None, lines: Callable[[dict[str, Any]], list[str]]) -> None:
    """Writes what was asked for of a report."""
    echo_notes("adavit-export", export_notes(report))
    console.write_json(report, json_file)
    if json_file != "-":
        for line in lines(report):
            click.echo(console.printable(line))


def _export_lines(report: dict[str, Any]) -> list[str]:
    """The summary of an export or a check."""
    lines = console.export_lines(report)
    calibrated = cast(dict[str, dict[str, Any]], report.get("calibration") or {})
    for precision, found in calibrated.items():
        lines += precision_lines(precision, found)
    return lines + console.end_lines(report)


def _add(
    bundle: Path, build: BuildOptions, budgets: BudgetOptions, threads: int | None, progress: console.Progress
) -> dict[str, Any]:
    """Adds to a bundle what is asked for."""
    from adavit.calibration.budgets import add_budgets
    from adavit.calibration.statistics import record_policies
    from adavit.tensorrt.build import add_engines

    report: dict[str, Any] = {"bundle": str(bundle), "budgets": add_budgets(bundle, budgets, threads, progress)}
    if budgets.calibration_images and not budgets.budgets:
        report["statistics"] = record_policies(bundle, budgets, threads, progress)
    return report | {"engine_sets": add_engines(bundle, build, progress)}


def _export(
    source: Path | None,
    output: Path | None,
    check: Path | None,
    against: Path | None,
    threads: int | None,
    options: dict[str, Any],
    progress: console.Progress,
) -> dict[str, Any]:
    """Exports a checkpoint, or checks a bundle."""
    from adavit.export import ExportOptions, check_bundle, export_bundle

    if check is not None:
        if against is None or source is not None or output is not None:
            raise click.UsageError("--check BUNDLE takes --against CHECKPOINT and neither CHECKPOINT nor --output")
        refuse({*EXPORTING, "target", "budgets", "budget_images", *CALIBRATION_IMAGES}, "to check a BUNDLE, leave out")
        return check_bundle(check, against, options["heads"], threads, progress)
    if source is None or output is None:
        raise click.UsageError("give a CHECKPOINT and --output BUNDLE, or --check BUNDLE --against CHECKPOINT")
    refuse({"against"}, "an export is verified against its CHECKPOINT, leave out")
    return export_bundle(source, output, ExportOptions(**options, threads=threads), progress)


def _export_single(
    source: Path | None, target: Path, json_file: str | None, threads: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Writes the file that is asked for, and returns the report."""
    if source is None:
        raise click.UsageError("give a BUNDLE or a CHECKPOINT for --single-file")
    refuse(NEVER, "to write a single file, leave out")
    given = names_demo(source) or is_bundle(source)
    if given:
        refuse(OF_CHECKPOINTS, "to write a single file of a BUNDLE, leave out")
    calibration = CalibrationOptions.taken_from(options)
    build, budgets = BuildOptions.taken_from(options), BudgetOptions.taken_from(options)
    with console.Progress(single_stages(given, options["verify"], calibration, budgets)) as progress:
        from adavit.export import ExportOptions, SingleFileOptions, export_single_file
        from adavit.export.single_options import files_of

        single = SingleFileOptions.taken_from(
            options,
            calibration=calibration,
            verify=options["verify"],
            force=options["force"],
            threads=threads,
        )
        export = ExportOptions(**options, build=build, budgets=budgets, threads=threads)
        written = set(map(os.path.realpath, files_of(target, single.ort_format).values()))
        if json_file and os.path.realpath(json_file) in written:
            raise click.UsageError(f"--json {json_file} is a file that --single-file writes; name another")
        return export_single_file(source, target, single, export, progress)


@click.command(cls=console.Command, name="adavit-run", epilog=RUN_EXAMPLES)
@click.argument("bundles", metavar="[BUNDLE]...", type=PATH, nargs=-1)
@run_options
@click.version_option(__version__)
def run(bundles: tuple[Path, ...], compare: bool, json_file: str | None, **options: Any) -> None:
    """Run a BUNDLE on images, and measure it against its dense twin.

    BUNDLE is a folder that adavit-export made, or `demo`, the default: the demo that comes with this package, on its
    own images. Without --images, other bundles run on random input. --compare takes two BUNDLEs or more, or one of
    several precisions.
    """
    from adavit.measure.options import RunOptions
    from adavit.measure.run import run_bundle

    if len(bundles) > 1 and not compare:
        raise click.UsageError(f"one BUNDLE is run at a time, {len(bundles)} are given; add --compare to compare them")
    if options["labels_by_order"] and not options["images"]:
        raise click.UsageError("--labels-by-order is of the class folders of --images; give them too")
    if options["iterations"] and options["seconds"]:
        raise click.UsageError("give --iterations or --seconds, not both")
    if sum(options[key] is not None for key in ("budget", "latency_ms", "replay_policy")) > 1:
        raise click.UsageError("give one of --budget, --latency-ms and --replay-policy")
    if options["profile"] and Path(options["profile"]).is_dir():
        raise click.UsageError(f"--profile {options['profile']} is a folder; a BUNDLE goes before --profile")
    if options["draw"] and options["draw"].suffix.lower() != ".png":
        raise click.UsageError(f"--draw {options['draw']} is no name of a PNG; end it in .png")
    written = {f"--{name.replace('_', '-')}": options[name] or None for name in ("record_policy", "draw", "profile")}
    console.check_targets({"--json": json_file, **written})
    with console.Progress(_stages(options)) as progress:
        bundle = bundles[0] if bundles else None
        if compare:
            report, lines = _compare(bundles, options, progress), compare_lines
        else:
            report, lines = run_bundle(bundle, RunOptions(**options), progress), run_lines
    echo_notes("adavit-run", report["notes"])
    for skipped in report.get("skipped", ()):
        click.echo(f"adavit-run: skipped {skipped}", err=True)
    console.write_json(report, json_file)
    if json_file != "-":
        for line in lines(report):
            click.echo(console.printable(line))


def _stages(options: dict[str, Any]) -> Sequence[Stage]:
    """What the command is going to do, unless it compares."""
    seconds, iterations, backend = (options[key] for key in ("seconds", "iterations", "backend"))
    return running_stages(
        seconds, iterations, options["latency_ms"] is not None, options["profile"] is not None, backend
    )


def _compare(bundles: tuple[Path, ...], options: dict[str, Any], progress: console.Progress) -> dict[str, Any]:
    """Compares bundles on images."""
    from adavit.measure.compare_bundles import compare_bundles, listed
    from adavit.measure.options import RunOptions

    if not bundles:
        raise click.UsageError("--compare takes two BUNDLEs or more, such as --compare fp32 int8 --images photos/")
    if not options["images"]:
        raise click.UsageError("--compare measures on images: give --images")
    refuse({*OPERATING, "top"}, "--compare runs the trained policies, without")
    found = listed(bundles, options["precision"])
    progress.expect(comparing_stages(len(found), options["seconds"], options["iterations"]))
    return compare_bundles(found, RunOptions(**options), progress)
