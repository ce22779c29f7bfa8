"""Decision parity and accuracy of every precision, and of naive calibration, on labelled images.

    python benchmarks/precision.py CHECKPOINT --calibration photos/ --images test/ --output results/

CHECKPOINT is a file or `demo`. Naive calibration gives every sub-layer all tokens of all images, whatever the policy.
Writes the bundles and `precision.json`, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from adavit.bundle.bundle import write_config
from adavit.calibration.convert import assign, converted
from adavit.calibration.options import METHODS
from adavit.calibration.ranges import Ranges, measure_ranges
from adavit.calibration.recording import Recorder
from adavit.console.output import Progress, table
from adavit.datasets.image_files import find_images
from adavit.export import ExportOptions, export_bundle
from adavit.files import folder_beside
from adavit.graphs.files import write_graphs
from adavit.measure.compare_bundles import compare_decisions
from adavit.runtime.loading import load
from adavit.runtime.session import Runtime

OTHERS = "fp32", "config.json"
"""Of an fp32 bundle: what one in another precision has in its place."""


def measured(runtime: Runtime, images: Path, naive: bool, progress: Progress) -> Ranges:
    recorder = Recorder(runtime, capacity=64, naive=naive)
    files = find_images([images], runtime.labels)
    for done, file in enumerate(files, 1):
        recorder.run(runtime.preprocess(file.path))
        progress("running calibration images", done / len(files))
    return measure_ranges(runtime.graphs, recorder, progress)


def write(runtime: Runtime, folder: Path, precision: str, ranges: Ranges, method: str, progress: Progress) -> None:
    """The bundle in another precision."""
    graphs, bundle = runtime.graphs, runtime.bundle
    weights = {name: graphs.tensors.array(name) for name in graphs.tensors.tensors}
    tensors, units = converted(weights, assign(graphs.architecture, ranges, precision), ranges, method)
    opset = graphs.files.opset
    files = write_graphs(folder, precision, graphs.architecture, tensors, opset, True, progress, units)
    shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns(*OTHERS), dirs_exist_ok=True)
    write_config(folder, {**bundle.config, "precisions": {precision: files.to_dict()}})


def make(arguments: argparse.Namespace, progress: Progress) -> dict[str, Path]:
    """The bundles by name, the fp32 one first."""
    output = arguments.output
    bundles = {"fp32": output / "fp32"}
    export_bundle(Path(arguments.checkpoint), bundles["fp32"], ExportOptions(force=True), progress)
    runtime = load(bundles["fp32"], specialise=False)
    ranges = {naive: measured(runtime, arguments.calibration, naive, progress) for naive in (False, True)}
    kinds = [("fp16", "max", False)]
    kinds += [("int8", method, naive) for naive in (False, True) for method in arguments.methods]
    for precision, method, naive in kinds:
        name = precision if precision == "fp16" else f"{precision}-{method}{'-naive' if naive else ''}"
        with folder_beside(output / name) as folder:
            write(runtime, folder, precision, ranges[naive], method, progress)
        bundles[name] = output / name
    return bundles


def row(name: str, report: dict[str, Any], share: float) -> tuple[str, ...]:
    free, accuracy = report["free"], report["accuracy"]
    drop = "" if accuracy is None else f"{100 * (accuracy['first'] - accuracy['second']):.2f}"
    shares = (f"{value:.3%}" for value in (free["flipped"], report["replayed"]["flipped"]))
    return (name, f"{share:.3f}", drop, *shares, f"{free['identical_policies']:.1%}", f"{free['top1_agreement']:.2%}")


def size(runtime: Runtime) -> int:
    return runtime.graphs.files.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    for name in ("calibration", "images", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = [
        ("bundle", "bytes / fp32", "drop, points", "flipped", "replayed", "same policy", "agreement")
    ]
    reports = {}
    with Progress() as progress:
        bundles = make(arguments, progress)
        first = bundles.pop("fp32")
        for name, bundle in bundles.items():
            runtimes = [load(path, specialise=False) for path in (first, bundle)]
            files = find_images([arguments.images], runtimes[0].labels)
            reports[name] = compare_decisions(runtimes, files, progress).parities[0].report()
            rows.append(row(name, reports[name], size(runtimes[1]) / size(runtimes[0])))
    (arguments.output / "precision.json").write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
