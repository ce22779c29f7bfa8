"""The commands `adavit-export` and `adavit-run`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import click
from click.core import ParameterSource

from adavit import console
from adavit.budget_options import BudgetOptions, budget_options
from adavit.console_notes import echo_notes, export_notes
from adavit.console_precision import calibration_lines, compare_lines
from adavit.console_tune import tune_lines
from adavit.files import find_folder
from adavit.option_types import Finite, Threads, labels_by_order
from adavit.precision_options import CalibrationOptions, calibration_options
from adavit.runtime.backend import names as backend_names
from adavit.tensorrt.options import BuildOptions, build_options
from adavit.version import __version__

PATH = click.Path(path_type=Path)
CALIBRATING = ("calibration_cache", "samples", "method", "decision_precision", "max_drop", "seed")
"""Options that only an export in another precision than fp32 follows."""
CALIBRATION_IMAGES = ("calibration_images", "labels_by_order")
EXPORTING = ("with_dense", "opset", "labels", "image_size", "crop_ratio", "verify", "force", "precision", *CALIBRATING)
"""Options that only an export of a checkpoint follows."""
MEASURING = ("iterations", "seconds", "record_policy", "replay_policy", "budget", "latency_ms", "profile")
"""Options of a measurement alone."""


@click.command(cls=console.Command, name="adavit-export")
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=PATH, required=False)
@click.option("--output", "-o", type=PATH, help="Folder to write the bundle to.")
@click.option("--with-dense/--no-dense", default=None, help="Add the dense twin, the baseline of every benchmark.")
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX operator set.")
@click.option("--labels", type=PATH, help="Text file with one class name a line.")
@click.option(
    "--image-size", type=click.IntRange(1), help="Side of the input in pixels; interpolates the position embedding."
)
@click.option(
    "--crop-ratio", type=Finite(0.1, 1), help="Share of the short side the crop keeps.  [default: as noted, or 0.9]"
)
@click.option("--heads", type=click.IntRange(1), help="Attention heads, where the checkpoint does not tell.")
@click.option("--verify/--no-verify", default=True, help="Run the bundle against the checkpoint before it is kept.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--check", type=PATH, metavar="BUNDLE", help="Verify an existing bundle instead of exporting.")
@click.option("--against", type=PATH, metavar="CHECKPOINT", help="The checkpoint that --check compares with.")
@click.option("--threads", type=Threads(), help="CPU threads of the verification.")
@budget_options
@calibration_options
@build_options
@click.option("--json", "json_file", metavar="FILE|-", help="Write a report as JSON; - is standard output.")
@click.version_option(__version__)
def export(
    source: Path | None,
    output: Path | None,
    check: Path | None,
    against: Path | None,
    json_file: str | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Turn a trained AdaViT into a bundle of engines, and prove that it computes the same.

    CHECKPOINT is a training checkpoint, a state dict or a safetensors file, whatever its name; `demo` is the small
    Fashion-MNIST model that comes with this package. To a BUNDLE, --target adds TensorRT engines and
    --budgets operating points.
    """
    console.check_target("--json", json_file)
    calibration = CalibrationOptions.taken_from(options)
    build, budgets = BuildOptions.taken_from(options), BudgetOptions.taken_from(options)
    with console.Progress() as progress:
        adds = build.target or budgets.budgets
        if source is not None and adds and (find_folder(source) / "config.json").is_file():
            if output is not None or check is not None:
                raise click.UsageError("to add to a BUNDLE, leave out --output and --check")
            _refuse({*EXPORTING, "heads", "against"}, "to add to a BUNDLE, leave out")
            report = _add(source, build, budgets, threads, progress)
        else:
            options |= {"build": build, "budgets": budgets, "calibration": calibration}
            report = _export(source, output, check, against, threads, options, progress)
    echo_notes("adavit-export", export_notes(report))
    console.write_json(report, json_file)
    if json_file != "-":
        lines = console.export_lines(report)
        if calibrated := cast(dict[str, Any], report.get("calibration")):
            lines += calibration_lines(calibrated)
        for line in lines:
            click.echo(console.printable(line))


def _refuse(names: Collection[str], mode: str) -> None:
    """Refuses options that would be ignored; `mode` says by what, and ends where the option is named."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name in names:
            raise click.UsageError(f"{mode} {option.opts[0]}")


def _add(
    bundle: Path, build: BuildOptions, budgets: BudgetOptions, threads: int | None, progress: console.Progress
) -> dict[str, Any]:
    """Adds to a bundle what is asked for."""
    from adavit.calibration.budgets import add_budgets
    from adavit.tensorrt.build import add_engines

    added = add_budgets(bundle, budgets, threads, progress)
    return {"bundle": str(bundle), "budgets": added, "engine_sets": add_engines(bundle, build, progress)}


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
        _refuse({*EXPORTING, "target", "budgets", "budget_images", *CALIBRATION_IMAGES}, "to check a BUNDLE, leave out")
        return check_bundle(check, against, options["heads"], threads, progress)
    if source is None or output is None:
        raise click.UsageError("give a CHECKPOINT and --output BUNDLE, or --check BUNDLE --against CHECKPOINT")
    _refuse({"against"}, "an export is verified against its CHECKPOINT, leave out")
    if options["calibration"].precision == "fp32":
        images = () if options["budgets"].budgets else CALIBRATION_IMAGES
        _refuse({*CALIBRATING, *images}, "nothing is calibrated in fp32, give a --precision or leave out")
    return export_bundle(source, output, ExportOptions(**options, threads=threads), progress)


@click.command(cls=console.Command, name="adavit-run")
@click.argument("bundle", type=PATH, required=False)
@click.option("--images", type=PATH, multiple=True, help="Image file or folder; class-named folders give accuracy.")
@labels_by_order
@click.option("--batch", type=click.IntRange(1, 4096), default=1, show_default=True, help="Images per run.")
@click.option("--iterations", type=click.IntRange(1), help="Measured runs.")
@click.option("--seconds", type=Finite(0.01), help="Length of the measurement.  [default: 3]")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Runs before the measurement.")
@click.option("--threads", type=Threads(), help="CPU threads.  [default: all this process may use]")
@click.option(
    "--backend",
    type=click.Choice([*backend_names(), "auto"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the engines; auto measures what is installed, once, and takes the fastest.",
)
@click.option(
    "--provider", help="ONNX Runtime's execution provider [default: CPUExecutionProvider], or OpenVINO's fp32 or bf16."
)
@click.option("--cuda-graphs", is_flag=True, help="TensorRT: make CUDA graphs of what runs again.")
@click.option(
    "--trust-engines", is_flag=True, help="TensorRT: run engines that you did not build on this machine; native code."
)
@click.option(
    "--parallel",
    type=click.Choice(["operators", "samples"]),
    help="What the threads share.  [default: operators for one image a run, else samples]",
)
@click.option("--record-policy", type=PATH, metavar="FILE", help="Write what every image used (npz).")
@click.option("--replay-policy", type=PATH, metavar="FILE", help="Follow a recorded policy instead of deciding.")
@click.option(
    "--budget",
    type=Finite(0, 1, min_open=True),
    metavar="SHARE",
    help="Mean share of the dense MACs to run at, such as 0.4.",
)
@click.option("--latency-ms", type=Finite(0, min_open=True), help="Run at the budget that takes this long.")
@click.option("--dense/--no-dense", default=None, help="Alternate with the dense twin.  [default: where it is there]")
@click.option(
    "--profile",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Show where the time goes; FILE becomes a trace that Perfetto opens.",
)
@click.option(
    "--specialise/--no-specialise",
    default=True,
    show_default=True,
    help="Make engines for what some of the images keep most.",
)
@click.option("--tune", is_flag=True, help="Instead: measure engines and policies, and keep the plan that is fastest.")
@click.option("--top", type=click.IntRange(1, 100), default=1, show_default=True, help="Classes shown per image.")
@click.option(
    "--compare", type=(PATH, PATH), metavar="A B", help="Instead: how far bundle B's decisions and classes are A's."
)
@click.option("--json", "json_file", metavar="FILE|-", help="Write the numbers as JSON; - is standard output.")
@click.version_option(__version__)
def run(
    bundle: Path | None, tune: bool, compare: tuple[Path, Path] | None, json_file: str | None, **options: Any
) -> None:
    """Run a BUNDLE on images, and measure it against its dense twin.

    Without BUNDLE, the demo that comes with this package runs on its own images. Without --images, a bundle
    runs on random input.
    """
    from adavit.runtime.evaluate import RunOptions, run_bundle

    if options["labels_by_order"] and not options["images"]:
        raise click.UsageError("--labels-by-order is of the class folders of --images; give them too")
    if options["iterations"] and options["seconds"]:
        raise click.UsageError("give --iterations or --seconds, not both")
    if sum(options[key] is not None for key in ("budget", "latency_ms", "replay_policy")) > 1:
        raise click.UsageError("give one of --budget, --latency-ms and --replay-policy")
    if options["profile"] and Path(options["profile"]).is_dir():
        raise click.UsageError(f"--profile {options['profile']} is a folder; a BUNDLE goes before --profile")
    for name, target in (("json", json_file), ("record-policy", options["record_policy"])):
        console.check_target(f"--{name}", target)
    console.check_target("--profile", options["profile"] or None)
    with console.Progress() as progress:
        if compare is not None:
            report, lines = _compare(bundle, compare, options, progress), compare_lines
        elif tune:
            report, lines = _tune(bundle, options, progress), tune_lines
        else:
            report, lines = run_bundle(bundle, RunOptions(**options), progress), console.run_lines
    echo_notes("adavit-run", report["notes"])
    for skipped in report.get("skipped", ()):
        click.echo(f"adavit-run: skipped {skipped}", err=True)
    console.write_json(report, json_file)
    if json_file != "-":
        for line in lines(report):
            click.echo(console.printable(line))


def _compare(
    bundle: Path | None, compare: tuple[Path, Path], options: dict[str, Any], progress: console.Progress
) -> dict[str, Any]:
    """Compares two bundles on images."""
    from adavit.runtime.compare import compare_bundles

    if bundle is not None or not options["images"]:
        raise click.UsageError("--compare A B takes --images and no other BUNDLE")
    _refuse({*MEASURING, "tune"}, "--compare runs the trained policies once, without")
    images, backend, threads, provider = (options[key] for key in ("images", "backend", "threads", "provider"))
    by_order, trust = options["labels_by_order"], options["trust_engines"]
    return compare_bundles(*compare, images, backend, threads, provider, progress, by_order, trust)


def _tune(bundle: Path | None, options: dict[str, Any], progress: console.Progress) -> dict[str, Any]:
    """Tunes a bundle on this machine."""
    from adavit.runtime.evaluate import RunOptions, tune_bundle

    _refuse({*MEASURING, "labels_by_order"}, "--tune measures by itself, without")
    return tune_bundle(bundle, RunOptions(**options), progress)
