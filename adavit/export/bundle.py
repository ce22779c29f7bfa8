"""From a checkpoint to a verified bundle, and checking one again later."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adavit.bundle.bundle import PRECISIONS, WEIGHTS, Bundle, GraphFiles, is_bundle
from adavit.bundle.demo import DEMO_NAME, demo_bundle
from adavit.bundle.preprocessing import Preprocessor
from adavit.calibration.budgets import add_budgets
from adavit.calibration.statistics import IMAGES, add_statistics
from adavit.datasets.image_files import find_calibration_images, read_images
from adavit.errors import BundleError, InputError, OptionError, VerificationError
from adavit.export.options import ExportOptions
from adavit.export.verify import verify
from adavit.export.write import describe_bundle
from adavit.files import find_folder, folder_beside, sha256
from adavit.graphs.files import write_graphs
from adavit.graphs.stem import stem_tensors
from adavit.model import AdaViT, load_checkpoint, resize
from adavit.model.checkpoint import read_classes, read_crop
from adavit.reading import read_labels
from adavit.runtime.session import load
from adavit.tensorrt.options import BuildOptions

__all__ = ["check_bundle", "export_bundle"]

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]

DEMO = demo_bundle().parent
GENERIC = ("weights", "checkpoint", "model", "model_best", "pytorch_model", "best", "last")
"""Names of files that tell nothing of the model."""


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
    demo, source = _is_demo(source), _checkpoint(source)
    _refuse_bundle(source, output, options.calibration.precisions)
    options.check()
    _check_output(output, options.force)
    progress("loading the checkpoint", 0.0)
    model = load_checkpoint(source, options.heads)
    if not model.arch.adapts:
        _check_dense_alone(source, options)
    if options.image_size is not None:
        model = resize(model, options.image_size)
    labels = _labels(options.labels or (DEMO / "labels.txt" if demo else None), source, model.arch.classes)
    prepare = _preprocessor(source, model, options)
    about: dict[str, Any] = {
        "name": "adavit-demo" if demo else _model_name(source),
        "checkpoint": {"file": source.name, "sha256": sha256(source.read_bytes())},
    }
    if demo and options.image_size is None:
        about["budgets"] = Bundle.open(demo_bundle()).config["budgets"]  # of the same weights
    precisions = options.calibration.precisions
    calibrated: dict[str, Any] = {}
    with folder_beside(output) as folder:
        graphs = {"fp32": _write_fp32(folder, model, _notes(model, labels, prepare), options, progress)}

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
        budgets = add_budgets(folder, options.budgets, options.threads, progress)
        if model.arch.adapts and options.budgets.calibration_images and not options.budgets.budgets:
            _record_policies(folder, options, progress)
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


def _record_policies(folder: Path, options: ExportOptions, progress: Progress) -> None:
    """Runs some of the calibration images, for the bundle's statistics."""
    runtime = load(folder, threads=options.threads, specialise=False)
    files = find_calibration_images(options.budgets.calibration_images, runtime.labels, options.budgets.labels_by_order)
    pixels, _ = read_images(files, runtime.preprocess, IMAGES)
    add_statistics(folder, runtime, pixels, progress)


def _engine_sets(folder: Path, options: BuildOptions, progress: Progress) -> dict[str, Any]:
    """The TensorRT engines that are asked for, built; see `adavit.tensorrt.build.add_engines`."""
    if not options.target:
        return {}
    from adavit.tensorrt.build import add_engines

    return add_engines(folder, options, progress)


def _notes(model: AdaViT, labels: Sequence[str], prepare: Preprocessor) -> dict[str, str]:
    """What the weights' file notes, for exports of that file."""
    return {
        "format": "pt",
        "num_heads": str(model.arch.heads),
        "classes": json.dumps(labels),
        "crop_ratio": str(prepare.crop_ratio),
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


def check_bundle(
    bundle: Path, checkpoint: Path, heads: int | None, threads: int | None, progress: Progress
) -> dict[str, Any]:
    """Verifies an existing bundle against a checkpoint; raises VerificationError where they differ."""
    start = time.perf_counter()
    progress("loading the bundle", 0.0)
    precisions = Bundle.open(bundle).graphs
    if "fp32" not in precisions:
        raise InputError(f"{bundle} is {', '.join(precisions)}: compare it with fp32 by adavit-run --compare")
    runtime = load(bundle, threads=threads, precision="fp32", specialise=False)
    progress("loading the checkpoint", 0.0)
    model = resize(load_checkpoint(_checkpoint(checkpoint), heads), runtime.architecture.image_size)
    if model.arch != runtime.architecture:
        ours, theirs = runtime.architecture.to_dict(), model.arch.to_dict()
        differing = ", ".join(f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key])
        raise VerificationError(f"{bundle} and {checkpoint} are of different architectures: {differing}")
    verified = verify(model, runtime, progress)
    return {"bundle": str(bundle), "verified": verified, "seconds": time.perf_counter() - start}


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


def _checkpoint(source: Path) -> Path:
    """The file of a checkpoint: the demo's where the path means that."""
    return demo_bundle() / "fp32" / WEIGHTS if _is_demo(source) else source


def _refuse_bundle(source: Path, output: Path, precisions: Sequence[str]) -> None:
    """Raises InputError where a bundle is given in the place of the checkpoint that it was made of."""
    if is_bundle(source):
        raise InputError(
            f"{source} is a bundle; a bundle of any precision is exported from the checkpoint: "
            f"adavit-export CHECKPOINT --output {output} --precision {','.join(precisions)}"
        )


def _is_demo(source: Path) -> bool:
    """Whether a checkpoint is asked for by the demo's name: a file of that name is meant first, a folder is none."""
    return str(source) == DEMO_NAME and not source.is_file()


def _model_name(source: Path) -> str:
    """The model's name: the file's, or its folder's where files of every model are named so."""
    folder = source.absolute().parent
    if folder.name in PRECISIONS:  # the weights of a bundle
        folder = folder.parent
    return folder.name if source.name.split(".")[0] in GENERIC and folder.name else source.stem


def _check_output(output: Path, force: bool) -> None:
    if not output.parent.is_dir():
        raise BundleError(f"{output.parent}: no such folder to write the bundle into; make it first")
    find_folder(output)
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise BundleError(f"{output}: is there and is no folder; choose another `output`")
    if not output.exists():
        return
    if any(output.iterdir()) and not is_bundle(output):
        raise BundleError(f"{output}: is a folder, but not a bundle; choose another `output`")
    if not force:
        raise BundleError(f"{output}: already there; give `force=True` to replace it")


def _labels(path: Path | None, source: Path, classes: int) -> list[str]:
    """Those of a file, else those that the checkpoint notes, else numbers."""
    if path is None:
        noted = read_classes(source)
        if len(set(noted)) == len(noted) == classes:
            return noted
        if noted:
            counts = source, len(noted), len(set(noted)), classes
            log.warning("%s: %d class names (%d different) for %d classes; labels are numbers, give `labels`", *counts)
        return [str(index) for index in range(classes)]
    labels = read_labels(path)
    if len(labels) != classes or not all(labels) or len(set(labels)) != classes:
        raise InputError(
            f"{path}: {len(labels)} lines, but the model has {classes} classes; one name a line, no two alike"
        )
    return labels


def _preprocessor(source: Path, model: AdaViT, options: ExportOptions) -> Preprocessor:
    """What images go through: as asked for, as the checkpoint notes, or as is usual for ImageNet."""
    crop_ratio = options.crop_ratio
    if crop_ratio is None:
        crop_ratio = read_crop(source) or Preprocessor.crop_ratio
    mean, std = options.mean or Preprocessor.mean, options.std or Preprocessor.std
    return Preprocessor(model.arch.image_size, crop_ratio, mean, std)
