"""`adavit.export_bundle` and `adavit.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adavit.api.given import (
    Place,
    Places,
    Progress,
    images_given,
    installed,
    model_given,
    path_of_option,
    paths_of,
    told_of,
)
from adavit.arguments import choice, each, flag, number, plain, whole
from adavit.bundle.bundle import PRECISIONS
from adavit.errors import OptionError
from adavit.reading import path_of

__all__ = ["compare", "export_bundle"]


def export_bundle(
    checkpoint: Place,
    output: Place,
    *,
    precision: str | Sequence[str] = "fp32",
    calibration_images: Places = (),
    budgets: float | Sequence[float] = (),
    budget_images: int | None = None,
    labels: Place | None = None,
    labels_by_order: bool = False,
    image_size: int | None = None,
    crop_ratio: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    heads: int | None = None,
    license: str | None = None,
    dataset: str | Sequence[str] = (),
    opset: int = 20,
    with_dense: bool = True,
    verify: bool = True,
    force: bool = False,
    threads: int | None = None,
    calibration_cache: Place | None = None,
    samples: int = 64,
    method: str = "max",
    max_drop: float = 0.3,
    seed: int = 0,
    target: str | Sequence[str] = (),
    compute_capability: int | Sequence[int] = (),
    hardware_compatible: bool = False,
    version_compatible: bool = False,
    timing_cache: Place | None = None,
    workspace: int | None = None,
    builder_optimization_level: int | None = None,
    max_batch: int = 32,
    jobs: int = 1,
    strip_weights: bool = False,
    conditional: bool = False,
    leave_out_heads: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Exports a checkpoint as a bundle, as `adavit-export CHECKPOINT` does; nothing is left of a failed attempt.

    It needs the packages of `adavit[export]`.

    Args:
        checkpoint: a training checkpoint, a state dict or a safetensors file; "demo" for the model of this package.
        output: the folder to make.
        precision: number formats to write, "fp32", "fp16", "int8" or "mixed": a sequence, or a text such as
            "fp32,int8". The first runs by default.
        calibration_images: image files and folders, for budgets and for precisions other than fp32. Class-named
            folders give labels.
        budgets: operating points to add, as shares of the dense MACs.
        budget_images: how many images to find these on, 512 by default.
        labels: a text file with one class name a line.
        labels_by_order: match class folders with labels by their order, where no name fits.
        image_size: side of the input in pixels; interpolates the position embedding.
        crop_ratio: share of the short side that the crop keeps, from 0.1 to 1; as noted, or 0.9, by default.
        mean: what is subtracted of pixels in [0, 1], three numbers; ImageNet's by default.
        std: what that is divided by, three numbers; ImageNet's by default.
        heads: attention heads, where the checkpoint does not tell.
        license: of the weights, as the Hugging Face Hub names it, for the model card.
        dataset: names of data sets on the Hub that the model was trained on, for the model card.
        opset: ONNX operator set, from 17 to 23.
        with_dense: bring the dense twin along.
        verify: run the bundle against the checkpoint before it is kept.
        force: replace an existing bundle.
        threads: CPU threads, by default all that this process may use.
        calibration_cache: a file of ranges: read where it is there, else written; by default beside the bundle.
        samples: inputs kept for each sub-layer, from 16 to 4096.
        method: how int8 ranges are chosen: "max", "entropy" or "percentile".
        max_drop: points of accuracy (agreement, without labels) that mixed precision may lose.
        seed: of the choice of inputs.
        target: TensorRT engines to build too: "tensorrt" or "tensorrt-rtx", or both.
        compute_capability: GPUs of a tensorrt-rtx build, such as (86, 120); by default all from 80.
        hardware_compatible: tensorrt: engines run on Ampere GPUs and newer ones.
        version_compatible: tensorrt: engines run in this version and newer ones.
        timing_cache: tensorrt: a file of timings to read, and to add to.
        workspace: MiB that a layer may use while it runs.
        builder_optimization_level: how long the builder searches for faster kernels, from 0 to 5.
        max_batch: images of a batch at most in TensorRT.
        jobs: engines built at once.
        strip_weights: leave weights out of engines; loading takes them from the bundle.
        conditional: build the parts of blocks too: a batch can then skip a sub-layer on the GPU.
        leave_out_heads: build blocks a second time, without heads that calibration images hardly ever keep.
        progress: called with the stage and the share of it that is done, from 0 to 1.

    Returns:
        The report that `adavit-export --json` writes: "bundle", "precisions", "bytes", "opset", "architecture",
        "macs", "preprocessing", "calibration", "verified", "budgets", "engine_sets", "notes" and "seconds".

    Raises:
        InputError: an option, a path or the images cannot be used as given.
        CheckpointError: the checkpoint cannot be read, or is no complete AdaViT.
        BundleError: there is something else at `output`, or a bundle, without `force`.
        VerificationError: the bundle does not compute what the checkpoint computes.
        AdaViTError: a package is not installed; the message says how to install it.
        OSError: the disk is full, or may not be written to.

    Example:
        >>> report = adavit.export_bundle("weights.pth", "bundle")  # doctest: +SKIP
        >>> report["verified"]["max_logit_difference"] < 1e-3  # doctest: +SKIP
        True
    """
    source, folder, told = path_of(checkpoint, "checkpoint"), path_of(output, "output"), told_of(progress)
    shared = images_given(calibration_images, labels_by_order)
    with installed():
        from adavit.export import BudgetOptions, BuildOptions, CalibrationOptions, ExportOptions
        from adavit.export import export_bundle as export

        calibration = CalibrationOptions(
            precisions=_precisions(precision),
            calibration_cache=path_of_option("calibration_cache", calibration_cache),
            samples=plain(samples),
            method=method,
            max_drop=plain(max_drop),
            seed=plain(seed),
            **shared,
        )
        build = BuildOptions(
            target=each("target", target, "a name, or a sequence of names", str),
            compute_capability=each("compute_capability", compute_capability, "numbers such as (86, 120)", int),
            hardware_compatible=plain(hardware_compatible),
            version_compatible=plain(version_compatible),
            timing_cache=path_of_option("timing_cache", timing_cache),
            workspace=plain(workspace),
            builder_optimization_level=plain(builder_optimization_level),
            max_batch=plain(max_batch),
            jobs=plain(jobs),
            strip_weights=plain(strip_weights),
            conditional=plain(conditional),
            leave_out_heads=plain(leave_out_heads),
        )
        options = ExportOptions(
            with_dense=plain(with_dense),
            opset=plain(opset),
            **model_given(labels, image_size, crop_ratio, mean, std, heads),
            license=license,
            dataset=each("dataset", dataset, "a name, or a sequence of names", str),
            verify=plain(verify),
            force=plain(force),
            threads=plain(threads),
            calibration=calibration,
            build=build,
            budgets=BudgetOptions(
                budgets=each("budgets", budgets, "a share of the dense MACs, or a sequence of them", float, int),
                budget_images=plain(budget_images),
                **shared,
            ),
        )
        return export(source, folder, options, told)


def compare(
    bundles: Places,
    images: Places,
    *,
    precision: str | None = None,
    labels_by_order: bool = False,
    batch: int = 1,
    threads: int | None = None,
    parallel: str = "auto",
    seconds: float | None = None,
    iterations: int | None = None,
    warmup: int = 3,
    dense: bool | None = None,
    backend: str = "onnxruntime",
    provider: str | None = None,
    specialise: bool = True,
    dispatch: str = "auto",
    trust_engines: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares bundles of one model in size, speed, classes and decisions, as `adavit-run --compare` does.

    The first bundle is what the others are compared with. It runs in ONNX Runtime on the CPU, the others as asked for.

    Args:
        bundles: folders, or one of several precisions; a bundle is compared in each of its precisions.
        images: image files and folders; class-named folders give accuracy too.
        precision: the one to compare all bundles in.
        labels_by_order: match class folders with labels by their order, where no name fits.
        batch: images of a run.
        threads: CPU threads, by default all that this process may use.
        parallel: how images share them: "auto", "operators" or "samples", as for `adavit.load`.
        seconds: how long each bundle is measured, 3 by default.
        iterations: measured runs, in the place of seconds.
        warmup: runs before these.
        dense: whether dense twins are measured too; by default where they are there.
        backend: what runs the graphs, as for `adavit.load`.
        provider: of ONNX Runtime or OpenVINO, as for `adavit.load`.
        specialise: prepare for what the images use most, before the measurement.
        dispatch: how batches are driven on a GPU, as for `adavit.load`.
        trust_engines: as for `adavit.load`.
        progress: called with the stage and the share of it that is done, from 0 to 1.

    Returns:
        The report that `adavit-run --compare --json` writes: "bundles" has a row for each bundle and precision, and
        "advice" says which to ship here. The others are "batch", "threads", "parallel", "runs", "images_timed",
        "images", "labelled", "labels_by", "notes", "skipped" and "compared". Of two, what "compared" holds is there
        once more without that key.

    Raises:
        InputError: an option, a path or the images cannot be used as given, or the bundles are of different models.
        BundleError: a bundle is missing, damaged or of another version.
        BackendError: a backend is unknown, not installed, or fails.

    Example:
        >>> report = adavit.compare("bundle", "photos")  # doctest: +SKIP
        >>> report["advice"]["lines"]  # doctest: +SKIP
    """
    from adavit.measure.compare_bundles import compare_bundles, listed
    from adavit.measure.options import RunOptions

    told = told_of(progress)
    options = RunOptions(
        images=paths_of("images", images),
        batch=whole("batch", batch, 1, 4096),
        iterations=None if iterations is None else whole("iterations", iterations, 1),
        seconds=None if seconds is None else number("seconds", seconds, 0.01),
        warmup=whole("warmup", warmup, 0),
        threads=None if threads is None else whole("threads", threads, 1, 1024),
        backend=backend,
        provider=provider,
        parallel=choice("parallel", parallel, ("auto", "operators", "samples")),
        dispatch=choice("dispatch", dispatch, ("auto", "exact", "capacity", "conditional")),
        trust_engines=flag("trust_engines", trust_engines),
        dense=None if dense is None else flag("dense", dense),
        specialise=flag("specialise", specialise),
        labels_by_order=flag("labels_by_order", labels_by_order),
    )
    if not options.images:
        raise OptionError("a comparison measures on images; give `images`")
    if iterations is not None and seconds is not None:
        raise OptionError("give `iterations` or `seconds`, not both")
    if precision is not None:
        choice("precision", precision, PRECISIONS)
    return compare_bundles(listed(paths_of("bundles", bundles), precision), options, told)


def _precisions(value: object) -> tuple[str, ...]:
    """The names of a text with commas, or of a sequence."""
    found = value.split(",") if isinstance(value, str) else value
    return each("precision", found, "a text such as 'fp32,int8', or a sequence of names")
