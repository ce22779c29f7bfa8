"""From a bundle or a checkpoint to one ONNX file, verified before it is kept."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adavit.bundle.bundle import Bundle, is_bundle
from adavit.bundle.demo import names_demo
from adavit.bundle.graphs import Graphs
from adavit.bundle.operating_points import NO_POLICIES, TRAINED, Budgets, Offsets, present
from adavit.bundle.policy import Policy
from adavit.bundle.statistics import policy_at
from adavit.calibration.options import BudgetOptions, CalibrationOptions
from adavit.calibration.statistics import IMAGES, policy_of
from adavit.datasets.image_files import find_calibration_images, read_images
from adavit.errors import InputError, OptionError
from adavit.export.bundle import export_bundle
from adavit.export.options import ExportOptions
from adavit.export.single_describe import OPSET, describe, metadata_of
from adavit.export.single_int8 import compare_decisions, graphs_of
from adavit.export.single_options import SingleFileOptions, check_target, files_of
from adavit.export.single_ort import ort_bytes
from adavit.export.single_plan import plan_heads
from adavit.export.single_verify import FileSession, RuntimeResults, compare_with_checkpoint, verify_file
from adavit.files import write_beside
from adavit.graphs.nested import NestedBuilder
from adavit.graphs.single import SingleGraph, make_single
from adavit.graphs.single_heads import MICROSOFT
from adavit.graphs.single_sublayers import HeadPlan
from adavit.model import load_checkpoint
from adavit.runtime.session import Runtime

__all__ = ["export_single_file"]

MOST_BYTES = 2**31 - 1
"""Of a protobuf file."""
OF_CHECKPOINTS = ("labels", "image_size", "crop_ratio", "mean", "std", "heads")
"""Options that only the export of a checkpoint follows."""

Progress = Callable[[str, float], None]


def export_single_file(
    source: Path, output: Path, options: SingleFileOptions, export: ExportOptions, progress: Progress
) -> dict[str, Any]:
    """Writes a model as the one ONNX file `output`; nothing is left of a failed attempt.

    Args:
        source: a bundle, or a checkpoint, which is exported as a bundle first.
        output: the file to make. A description as JSON lies beside it afterwards.
        options: of the file.
        export: of the bundle, where the source is a checkpoint.
        progress: told the stage and the share done.

    Returns:
        The report that `adavit-export --single-file --json` writes.

    Raises:
        AdaViTError: the source, the options or the target are not usable, or verification failed.
    """
    start = time.perf_counter()
    options.check()
    check_target(output, options)
    with ExitStack() as stack:
        folder = stack.enter_context(_bundle_of(source, options, export, progress))
        progress("loading the bundle", 0.0)
        bundle = Bundle.open(folder)
        offsets, budgets = _operating_points(source, bundle, options)
        points = _points(options, offsets, budgets)
        graphs = stack.enter_context(graphs_of(source, bundle, options, [own for _, own in points], progress))
        plans = _plans(graphs.runtime, options, offsets, progress)
        description = describe(bundle, options, budgets)
        asked = SingleGraph(plans, offsets, budgets, options.with_policy)
        progress("writing the file", 0.0)
        data = _encoded(graphs.runtime.graphs, asked, options, metadata_of(description))
        made = {"file": data, "json": (json.dumps(description, indent=2) + "\n").encode()}
        if options.ort_format:
            made["ort"] = ort_bytes(data)
        verified = checked = None
        if options.verify:
            telling = FileSession(_telling(graphs.runtime, asked, data, options), output.name)
            verified = _verified(graphs.runtime, asked, made, telling, output.name, options, progress)
            checked = compare_decisions(telling, output.name, graphs, points, progress)
        files = files_of(output, options.ort_format)
        with ExitStack() as written:
            for key, path in files.items():
                written.enter_context(write_beside(path)).write(made[key])
    return {
        **{key: str(path) for key, path in files.items()},
        "bytes": len(data),
        "precision": description["precision"],
        "weights": description["weights"],
        "domain": options.domain,
        "opset": OPSET,
        "budget": description["budget"],
        "blocks": _counted(plans, bundle),
        "macs": description["macs"],
        "calibration": {"int8": graphs.calibration} if graphs.calibration else None,
        "verified": verified,
        "checked": checked,
        "notes": list(graphs.notes),
        "seconds": time.perf_counter() - start,
    }


@contextmanager
def _bundle_of(source: Path, options: SingleFileOptions, export: ExportOptions, progress: Progress) -> Iterator[Path]:
    """The bundle that is given, or one of a checkpoint for the time being."""
    if names_demo(source) or is_bundle(source) or source.is_dir():
        unused = [name for name in OF_CHECKPOINTS if getattr(export, name) is not None]
        unused += ["budgets"] if export.budgets.budgets else []
        unused += ["budget_images"] if export.budgets.budget_images is not None else []
        if unused:
            raise OptionError(f"to write a single file of a bundle, leave out `{unused[0]}`")
        yield source
        return
    budgeted = options.budget is not None or options.budget_input
    if budgeted and not export.budgets.budgets and source.exists():
        raise OptionError(
            f"{source} is a checkpoint, which has no operating points; give `budgets` and `calibration_images`, or "
            "export it as a bundle first"
        )
    options.calibration.check()
    with tempfile.TemporaryDirectory(prefix="adavit-") as scratch:
        bundle = Path(scratch) / "bundle"
        budgets = export.budgets if export.budgets.budgets else BudgetOptions()
        fp32 = replace(export, force=False, calibration=CalibrationOptions(), budgets=budgets)
        export_bundle(source, bundle, fp32, progress)
        yield bundle


def _operating_points(source: Path, bundle: Bundle, options: SingleFileOptions) -> tuple[Offsets, Budgets | None]:
    """The offsets that are baked in, or the points that a budget chooses from."""
    asked = [name for name in ("budget", "budget_input", "with_policy") if getattr(options, name)]
    asked += ["max_size"] if options.max_size > 1 else []
    if asked and not bundle.architecture.adapts:
        raise InputError(f"{source}: {NO_POLICIES}; leave out `{asked[0]}`")
    if options.budget_input:
        return TRAINED, present(bundle)
    return (TRAINED if options.budget is None else present(bundle).offsets(options.budget)), None


def _points(options: SingleFileOptions, offsets: Offsets, budgets: Budgets | None) -> list[tuple[float, Offsets]]:
    """The operating points that a file is for: each a budget, 0 for the trained policy, and its offsets."""
    if budgets is None:
        return [(options.budget or 0.0, offsets)]
    stored = [(point.budget, point.offsets) for point in budgets.points if point.offsets != TRAINED]
    return [(0.0, TRAINED), *stored]


def _plans(runtime: Runtime, options: SingleFileOptions, offsets: Offsets, progress: Progress) -> list[HeadPlan]:
    """How each block runs its heads."""
    quantised = options.precision == "int8"
    policy = None if quantised or not runtime.architecture.adapts else _usual(runtime, options, offsets, progress)
    plain = sum(tensor.bytes for tensor in runtime.graphs.tensors.tensors.values())
    spare, fused = (options.max_size - 1) * plain, options.domain == "onnxruntime"
    return plan_heads(runtime.architecture, policy, spare, fused, quantised)


def _usual(runtime: Runtime, options: SingleFileOptions, offsets: Offsets, progress: Progress) -> Policy | None:
    """What calibration images keep, or those of the bundle's statistics; None where there are none."""
    given = options.calibration
    if not given.calibration_images:
        policy = policy_at(runtime.bundle, offsets)
        if policy is None and options.max_size > 1:
            raise OptionError(
                "`max_size` is for frequent head sets, and nothing tells which they are; give `calibration_images`"
            )
        return policy
    files = find_calibration_images(given.calibration_images, runtime.labels, given.labels_by_order)
    pixels, _ = read_images(files, runtime.preprocess, IMAGES)
    return policy_of(runtime, pixels, offsets, lambda share: progress("running calibration images", share))


def _encoded(graphs: Graphs, asked: SingleGraph, options: SingleFileOptions, metadata: dict[str, str]) -> bytes:
    """The file's bytes."""
    builder = NestedBuilder("adavit", OPSET, graphs.tensors, options.weights == "fp16")
    make_single(builder, graphs.architecture, asked)
    model = builder.model(metadata, {MICROSOFT: 1} if options.domain == "onnxruntime" else {})
    if model.ByteSize() > MOST_BYTES:
        raise InputError(
            f"the file would take {model.ByteSize() / 1e9:.1f} GB, and one ONNX file holds 2 GB at most; give "
            "`weights` fp16, or use the bundle"
        )
    return bytes(model.SerializeToString())


def _telling(runtime: Runtime, asked: SingleGraph, data: bytes, options: SingleFileOptions) -> bytes:
    """The file's bytes if it tells what it keeps, else those of the same file that does."""
    if asked.with_policy or not runtime.architecture.adapts:
        return data
    return _encoded(runtime.graphs, replace(asked, with_policy=True), options, {})


def _verified(
    runtime: Runtime,
    asked: SingleGraph,
    made: dict[str, bytes],
    telling: FileSession,
    path: str,
    options: SingleFileOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Runs what was made, and compares it with the runtime and the checkpoint."""
    exact = options.weights != "fp16" and options.precision == "fp32"
    wanted = RuntimeResults(runtime, *_budgets_to_try(asked), progress)
    progress("verifying", 0.3)
    report = verify_file(telling.run(wanted.images, wanted.budgets), wanted, path, exact)
    progress("verifying", 0.6)
    for key in {"file", "ort"} & set(made):
        found = FileSession(made[key], path).run(wanted.images, wanted.budgets)
        report |= {"max_logit_difference": verify_file(found, wanted, path, exact)["max_logit_difference"]}
    if exact:
        weights = runtime.bundle.path / runtime.graphs.files.weights.file
        model = load_checkpoint(weights, runtime.architecture.heads)
        report["max_checkpoint_difference"] = compare_with_checkpoint(model, found["logits"], wanted, path)
    progress("verifying", 1.0)
    return report


def _budgets_to_try(asked: SingleGraph) -> tuple[list[Offsets], list[float]]:
    """Operating points to compare at: the trained policy, both ends, a point, and between two."""
    if not asked.budgets:
        return [asked.offsets], [0.0]
    shares = [point.budget for point in asked.budgets.points]
    middle = len(shares) // 2
    tried = [shares[0], shares[middle], (shares[0] + shares[middle]) / 2, shares[-1]]
    tried = [float(np.clip(float(np.float32(share)), shares[0], shares[-1])) for share in tried]
    return [TRAINED, *map(asked.budgets.offsets, tried)], [0.0, *tried]


def _counted(plans: list[HeadPlan], bundle: Bundle) -> dict[str, int]:
    """How many blocks run their heads in which way."""
    arch = bundle.architecture
    adapting = [plan for block, plan in enumerate(plans) if arch.adapts_heads(block)]
    masked = sum(plan.masked for plan in adapting)
    sets = sum(len(plan.attention) + len(plan.mlp) for plan in adapting)
    return {"masked": masked, "gathered": len(adapting) - masked, "constant_head_sets": sets}
