"""What an export starts from: its checkpoint, class names and preprocessing, and a folder that may be written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from adavit.bundle.bundle import PRECISIONS, WEIGHTS, is_bundle
from adavit.bundle.demo import DEMO_NAME, demo_bundle
from adavit.bundle.preprocessing import Preprocessor
from adavit.errors import BundleError, InputError
from adavit.export.options import ExportOptions
from adavit.files import find_folder
from adavit.model import AdaViT
from adavit.model.notes import read_classes, read_crop
from adavit.reading import read_labels

__all__ = [
    "check_output",
    "checkpoint_file",
    "find_labels",
    "find_preprocessor",
    "is_demo",
    "model_name",
    "refuse_bundle",
]

log = logging.getLogger(__name__)
GENERIC = ("weights", "checkpoint", "model", "model_best", "pytorch_model", "best", "last")
"""Names of files that tell nothing of the model."""


def checkpoint_file(source: Path) -> Path:
    """The file of a checkpoint: the demo's where the path means that."""
    return demo_bundle() / "fp32" / WEIGHTS if is_demo(source) else source


def refuse_bundle(source: Path, output: Path, precisions: Sequence[str]) -> None:
    """Raises InputError where a bundle is given in the place of the checkpoint that it was made of."""
    if is_bundle(source):
        raise InputError(
            f"{source} is a bundle; a bundle of any precision is exported from the checkpoint: "
            f"adavit-export CHECKPOINT --output {output} --precision {','.join(precisions)}"
        )


def is_demo(source: Path) -> bool:
    """Whether a checkpoint is asked for by the demo's name: a file of that name is meant first, a folder is none."""
    return str(source) == DEMO_NAME and not source.is_file()


def model_name(source: Path) -> str:
    """The model's name: the file's, or its folder's where files of every model are named so."""
    folder = source.absolute().parent
    if folder.name in PRECISIONS:  # the weights of a bundle
        folder = folder.parent
    return folder.name if source.name.split(".")[0] in GENERIC and folder.name else source.stem


def check_output(output: Path, force: bool) -> None:
    """Raises BundleError where the bundle may not be written to a folder."""
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


def find_labels(path: Path | None, source: Path, classes: int) -> list[str]:
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


def find_preprocessor(source: Path, model: AdaViT, options: ExportOptions) -> Preprocessor:
    """What images go through: as asked for, as the checkpoint notes, or as is usual for ImageNet."""
    crop_ratio = options.crop_ratio
    if crop_ratio is None:
        crop_ratio = read_crop(source) or Preprocessor.crop_ratio
    mean, std = options.mean or Preprocessor.mean, options.std or Preprocessor.std
    return Preprocessor(model.arch.image_size, crop_ratio, mean, std)
