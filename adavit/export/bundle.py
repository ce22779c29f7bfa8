"""From a checkpoint to a verified bundle."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adavit.bundle.bundle import Bundle, GraphFiles
from adavit.bundle.card import renew_points
from adavit.bundle.demo import demo_bundle
from adavit.bundle.preprocessing import Preprocessor
from adavit.calibration.budgets import add_budgets
from adavit.calibration.statistics import record_policies
from adavit.errors import OptionError
from adavit.export.options import ExportOptions
from adavit.export.published import check_published, published, published_notes, without_results
from adavit.export.sources import (
    check_output,
    checkpoint_file,
    find_labels,
    find_preprocessor,
    is_demo,
    model_name,
    refuse_bundle,
)
from adavit.export.verify import verify
from adavit.export.write import describe_bundle
from adavit.files import folder_beside, sha256
from adavit.graphs.files import write_graphs
from adavit.graphs.stem import stem_tensors
from adavit.model import AdaViT, load_checkpoint, resize
from adavit.runtime.loading import load
from adavit.tensorrt.options import BuildOptions

__all__ = ["export_bundle"]

Progress = Callable[[str, float], None]

DEMO = demo_bundle().parent


def export_bundle(source: Path, output: Path, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """Exports the checkpoint `source` as the bundle folder `output`; nothing is left of a failed attempt.

    Args:
        source: a checkpoint file, or `demo`, if no file has that name, for the model that comes with this package.
        output: the folder to make.
        options: how.
        progress: told the stage and the share done.

    Returns:
        The report that `adavit-export --json` writes.

    Raises:
        AdaViTError: the checkpoint, the options or the output folder are not usable, or verification failed.
    """
    start = time.perf_counter()
    demo, source = is_demo(source), checkpoint_file(source)
    refuse_bundle(source, output, options.calibration.precisions)
    options.check()
    check_published(options.license, options.dataset)
    check_output(output, options.force)
    progress("loading the checkpoint", 0.0)
    model = load_checkpoint(source, options.heads)
    if not model.arch.adapts:
        _check_dense_alone(source, options)
    if options.image_size is not None:
        model = resize(model, options.image_size)
    labels = find_labels(options.labels or (DEMO / "labels.txt" if demo else None), source, model.arch.classes)
    prepare = find_preprocessor(source, model, options)
    about: dict[str, Any] = {
        "name": "adavit-demo" if demo else model_name(source),
        "checkpoint": {"file": source.name, "sha256": sha256(source.read_bytes())},
    }
    shipped, as_shipped = Bundle.open(demo_bundle()) if demo else None, _as_shipped(options)
    known = published(source, options.license, options.dataset)
    card: dict[str, Any] = {}
    if shipped:
        card = shipped.config["card"] if as_shipped else without_results(shipped.config["card"])
        if options.image_size is None:
            about["budgets"] = shipped.config["budgets"]  # of the same weights
    if card := card | known:
        about["card"] = card
    precisions = options.calibration.precisions
    calibrated: dict[str, Any] = {}
    with folder_beside(output) as folder:
        graphs = {"fp32": _write_fp32(folder, model, _notes(model, labels, prepare, known), options, progress)}

        def describe(names: Sequence[str]) -> dict[str, Any]:
            files = [graphs[name] for name in names]
            return describe_bundle(folder, files, model.arch, labels, prepare, about)

        config = describe(["fp32"])
        verified = _verified(model, folder, options.threads, progress) if options.verify else None
        if precisions != ("fp32",):
            from adavit.calibration.calibrate import Calibration

            cache = options.calibration.calibration_cache or output.with_name(f"{output.name}.calibration.npz")
            calibration = Calibration(folder, options.calibration, cache, options.threads, progress)
            for precision in precisions:
                if precision != "fp32":
                    graphs[precision], calibrated[precision] = calibration.write(precision)
            config = describe(["fp32", *(name for name in precisions if name != "fp32")])
            if options.verify:
                for precision, report in calibrated.items():
                    report["checked"] = calibration.check(precision)
            if "fp32" not in precisions:
                shutil.rmtree(folder / "fp32")
            config = describe(precisions)
        if shipped and shipped.budgets and as_shipped:
            renew_points(folder, shipped.budgets)
        budgets = add_budgets(folder, options.budgets, options.threads, progress)
        if model.arch.adapts and options.budgets.calibration_images and not options.budgets.budgets:
            record_policies(folder, options.budgets, options.threads, progress)
        engine_sets = _engine_sets(folder, options.build, progress)
    files = {name: graphs[name] for name in precisions}
    return {
        "bundle": str(output),
        "precisions": {name: {"graphs": len(of.files()) - 1, "bytes": of.bytes} for name, of in files.items()},
        "bytes": sum(of.bytes for of in files.values()),
        "opset": options.opset,
        "calibration": calibrated or None,
        "architecture": config["architecture"],
        "macs": config["macs"],
        "preprocessing": {**asdict(prepare), "mean": list(prepare.mean), "std": list(prepare.std)},
        "verified": verified,
        "budgets": budgets,
        "engine_sets": engine_sets,
        "notes": [] if model.arch.adapts else [_without_policies(source)],
        "seconds": time.perf_counter() - start,
    }


def _engine_sets(folder: Path, options: BuildOptions, progress: Progress) -> dict[str, Any]:
    """The TensorRT engines that are asked for, built; see `adavit.tensorrt.build.add_engines`."""
    if not options.target:
        return {}
    from adavit.tensorrt.build import add_engines

    return add_engines(folder, options, progress)


def _as_shipped(options: ExportOptions) -> bool:
    """Whether an export of the demo is what its results were measured on."""
    changed = options.image_size, options.crop_ratio, options.mean, options.std
    return options.calibration.precisions[0] == "fp32" and not any(changed)


def _notes(model: AdaViT, labels: Sequence[str], prepare: Preprocessor, known: Mapping[str, Any]) -> dict[str, str]:
    """What the weights' file notes, for exports of that file."""
    return {
        "format": "pt",
        "num_heads": str(model.arch.heads),
        "classes": json.dumps(labels),
        "crop_ratio": str(prepare.crop_ratio),
        **published_notes(known),
    }


def _write_fp32(
    folder: Path, model: AdaViT, notes: Mapping[str, str], options: ExportOptions, progress: Progress
) -> GraphFiles:
    """The weights as they are, and the graphs on them."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    tensors = weights | stem_tensors(model.arch, weights)
    return write_graphs(
        folder, "fp32", model.arch, tensors, options.opset, options.with_dense, progress, metadata=notes
    )


def _verified(model: AdaViT, bundle: Path, threads: int | None, progress: Progress) -> dict[str, Any]:
    progress("loading the bundle", 0.0)
    return verify(model, load(bundle, threads=threads, specialise=False), progress)


def _check_dense_alone(source: Path, options: ExportOptions) -> None:
    """Raises OptionError where an option makes no sense for a model without policies."""
    precisions = options.calibration.precisions
    if not options.with_dense:
        raise OptionError(
            f"{source} has no policies: its bundle is its dense graph alone; leave out `with_dense=False`"
        )
    if precisions != ("fp32",):
        raise OptionError(
            f"{source} has no policies: only what policies dispatch is calibrated; leave out "
            f"`precision` {','.join(precisions)}, and quantise the bundle's fp32/dense.onnx with another tool"
        )
    if options.budgets.budgets:
        raise OptionError(f"{source} has no policies, and so takes the same MACs at any budget; leave out `budgets`")


def _without_policies(source: Path) -> str:
    return (
        f"{source} has no policies, so there is nothing to skip: the bundle is its dense graph alone. To train "
        f"policies: adavit-train adapt --from {source} --data ... --output ... (docs/training.md)"
    )
