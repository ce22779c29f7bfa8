"""`adavit.export_single_file`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adavit.api.given import Place, Places, Progress, images_given, installed, model_given, path_of_option, told_of
from adavit.arguments import each, plain
from adavit.reading import path_of

__all__ = ["export_single_file"]


def export_single_file(
    source: Place,
    output: Place,
    *,
    budget: float | None = None,
    budget_input: bool = False,
    with_policy: bool = False,
    domain: str = "standard",
    max_size: float = 1.0,
    weights: str | None = None,
    ort_format: bool = False,
    precision: str = "fp32",
    calibration_images: Places = (),
    labels_by_order: bool = False,
    calibration_cache: Place | None = None,
    samples: int = 64,
    method: str = "max",
    seed: int = 0,
    budgets: float | Sequence[float] = (),
    budget_images: int | None = None,
    labels: Place | None = None,
    image_size: int | None = None,
    crop_ratio: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    heads: int | None = None,
    verify: bool = True,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a model as one ONNX file, as `adavit-export --single-file` does; nothing is left of a failed attempt.

    The file runs in any ONNX Runtime, and skips what its policies drop. It needs the packages of `adavit[export]`.

    Args:
        source: a bundle, or a checkpoint, which is exported as a bundle first; "demo" for the model of this package.
        output: the file to make, which ends in .onnx. A description lies beside it, as JSON.
        budget: the share of the dense MACs that the file is for; the trained policy by default.
        budget_input: give the file a required input "budget", float32 [B]. 0 is the trained policy.
        with_policy: give the file the outputs "tokens" [B, L, N], "heads" [B, L, H], "sublayers" [B, L, 2] and
            "macs" [B].
        domain: operators: "standard" for ONNX's own, "onnxruntime" for ONNX Runtime's too.
        max_size: times the weights' size that constant weights of frequent head sets may make the file, from 1 to 4.
        weights: how they are stored, "fp32" or "fp16".
        ort_format: write the file in ONNX Runtime's own format too, as .ort.
        precision: "fp32", or "int8": calibrated for the file on `calibration_images`, or a bundle's own without them.
        calibration_images: image files and folders. In fp32 they show which heads are kept. int8 is calibrated on
            them, at the budgets that the file is for. Of a checkpoint, they serve `budgets` too.
        labels_by_order: match class folders with labels by their order, where no name fits.
        calibration_cache: a file of int8's ranges: read where it is there, else written; none by default.
        samples: inputs kept for each sub-layer, from 16 to 4096.
        method: how int8 ranges are chosen: "max", "entropy" or "percentile".
        seed: of the choice of inputs.
        budgets: of a checkpoint: operating points to find, as shares of the dense MACs.
        budget_images: how many images to find these on.
        labels: of a checkpoint: a text file with one class name a line.
        image_size: of a checkpoint: side of the input in pixels; interpolates the position embedding.
        crop_ratio: of a checkpoint: share of the short side that the crop keeps.
        mean: of a checkpoint: what is subtracted of pixels in [0, 1], three numbers.
        std: of a checkpoint: what that is divided by, three numbers.
        heads: of a checkpoint: attention heads, where it does not tell.
        verify: compare the file with the runtime and the checkpoint before it is kept.
        force: replace existing files.
        threads: CPU threads, by default all that this process may use.
        progress: called with the stage and the share of it that is done, from 0 to 1.

    Returns:
        The report that `adavit-export --single-file --json` writes: "file", "json", "ort" where it was asked for,
        "bytes", "precision", "weights", "domain", "opset", "budget", "blocks", "macs", "calibration", "verified",
        "checked", "notes" and "seconds".

    Raises:
        InputError: an option, a path or the images cannot be used as given, or there is a file without `force`.
        CheckpointError: the checkpoint cannot be read, or is no complete AdaViT.
        BundleError: the bundle is missing or damaged.
        VerificationError: the file does not compute what the runtime and the checkpoint compute.
        AdaViTError: a package is not installed; the message says how to install it.
        OSError: the disk is full, or may not be written to.

    Example:
        >>> report = adavit.export_single_file("demo", "demo.onnx", budget=0.4)  # doctest: +SKIP
        >>> report["verified"]["differing_decisions"]  # doctest: +SKIP
        0
    """
    path, target, told = path_of(source, "source"), path_of(output, "output"), told_of(progress)
    shared = images_given(calibration_images, labels_by_order)
    with installed():
        from adavit.export import BudgetOptions, CalibrationOptions, ExportOptions, SingleFileOptions
        from adavit.export import export_single_file as export

        single = SingleFileOptions(
            budget=plain(budget),
            budget_input=plain(budget_input),
            with_policy=plain(with_policy),
            domain=domain,
            max_size=plain(max_size),
            weights=weights,
            ort_format=plain(ort_format),
            calibration=CalibrationOptions(
                precisions=(precision,),
                calibration_cache=path_of_option("calibration_cache", calibration_cache),
                samples=plain(samples),
                method=method,
                seed=plain(seed),
                **shared,
            ),
            verify=plain(verify),
            force=plain(force),
            threads=plain(threads),
        )
        single.check()
        options = ExportOptions(
            **model_given(labels, image_size, crop_ratio, mean, std, heads),
            verify=plain(verify),
            threads=plain(threads),
            budgets=BudgetOptions(
                budgets=each("budgets", budgets, "a share of the dense MACs, or a sequence of them", float, int),
                budget_images=plain(budget_images),
                **shared,
            ),
        )
        return export(path, target, single, options, told)
