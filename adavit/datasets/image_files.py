"""Finding image files in folders, which may be labelled sets of class folders."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adavit.datasets.class_folders import Classes, ClassFolderError, Kind, match_folders, misfit
from adavit.datasets.folder_listing import ImageFolder, Listing, Note, list_images
from adavit.errors import InputError, bounded, shown
from adavit.reading import path_of

__all__ = ["ImageFile", "find_calibration_images", "find_images", "labels_by", "read_images"]

Float = npt.NDArray[np.float32]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFile:
    """An image on disk and, in a labelled set, its class.

    Attributes:
        path: of the file.
        label: the index of its class, or None.
        by: how the class is known: by the "name" of its folder, its "number" or its "order".
    """

    path: Path
    label: int | None = None
    by: Kind | None = field(default=None, compare=False)


def find_images(
    paths: Iterable[str | Path], labels: Sequence[str] | None, by_order: bool = False, note: Note | None = None
) -> list[ImageFile]:
    """Lists image files: files as given, folders sorted; a folder of class folders is a labelled set.

    Files and folders whose names begin with a dot are left out.

    Args:
        paths: files and folders.
        labels: the bundle's class names, which class folders are matched with by `match_folders`; None takes all
            images of a folder and of the folders in it, without labels.
        by_order: whether class folders that fit no label, and are as many, are the classes in sorted order.
        note: told what is left out, and where the order counts; by default a warning is logged.

    Raises:
        InputError: a path is not there, a folder cannot be listed or holds no image, or class folders fit no class.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    found: list[ImageFile] = []
    for given in paths:
        path = path_of(given, "image")
        if _is_folder(path):
            found += _in_folder(path, labels, by_order, _noting(path, note))
        else:
            found.append(ImageFile(path))
    return found


def find_calibration_images(
    paths: Iterable[str | Path], labels: Sequence[str], by_order: bool = False, note: Note | None = None
) -> list[ImageFile]:
    """As `find_images`; but class folders of other classes hold images too, without labels, and `note` is told so.

    Raises:
        InputError: as `find_images`; also for class folders that are not as many as the labels, if the order counts.
    """
    paths, notes = list(paths), list[str]()
    try:
        found = find_images(paths, labels, by_order, notes.append)
    except ClassFolderError as error:
        if by_order:
            raise
        notes = [f"{error}; going on without labels"]
        found = find_images(paths, None, note=notes.append)
    for line in notes:
        (note or log.warning)(line)
    return found


def read_images(
    files: Sequence[ImageFile], preprocess: Callable[[Path], Float], most: int
) -> tuple[Float, list[int | None]]:
    """At most so many of the files, evenly spaced, those of them that can be read: [B, 3, S, S], and their labels.

    Raises:
        InputError: none of them can be read.
    """
    pixels, labels = [], []
    for at in np.linspace(0, len(files) - 1, min(len(files), most)).round().astype(int):
        try:
            pixels.append(preprocess(files[at].path))
            labels.append(files[at].label)
        except InputError:  # reported where the images are first run
            continue
    if not pixels:
        raise InputError(f"none of {min(len(files), most)} of the calibration images can be read; remove broken files")
    return np.stack(pixels), labels


def labels_by(files: Iterable[ImageFile]) -> Kind | None:
    """How the classes of files are known; the weakest way, where several were needed; None without labels."""
    kinds = {file.by for file in files}
    ways: tuple[Kind, ...] = ("order", "number", "name")
    return next((kind for kind in ways if kind in kinds), None)


def _noting(folder: Path, note: Note | None) -> Note:
    return lambda text: (note or log.warning)(bounded(f"{folder}: {text}"))


def _is_folder(path: Path) -> bool:
    """Whether there is a folder and no file; raises InputError where there is nothing."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such image or folder") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _in_folder(path: Path, labels: Sequence[str] | None, by_order: bool, note: Note) -> list[ImageFile]:
    """The images of a folder, or of the class folders in it."""
    folder = list_images(path)
    if not folder.top.images and not folder.full:
        raise InputError(f"{path}: holds no image file")
    if labels is None:
        return _unlabelled(folder, [folder.top, *folder.inner.values()], note)
    try:
        classes = _classes(folder, labels, by_order, note)
    except ClassFolderError as error:
        raise ClassFolderError(f"{path}: {error}") from None
    if classes is None:
        return _unlabelled(folder, [folder.top], note)
    folder.tell_set(classes.index, note)
    return [
        ImageFile(image, label, classes.by)
        for name, label in classes.index.items()
        for image in folder.inner[name].images
    ]


def _unlabelled(folder: ImageFolder, listings: list[Listing], note: Note) -> list[ImageFile]:
    folder.tell_files(listings, note)
    return [ImageFile(image) for listing in listings for image in listing.images]


def _classes(folder: ImageFolder, labels: Sequence[str], by_order: bool, note: Note) -> Classes | None:
    """What the folders in a folder stand for; None where its own images are meant."""
    full = folder.full
    if full:
        if classes := match_folders(list(folder.inner), labels, by_order, folder.empty, note):
            return classes
        if not folder.top.images:
            raise misfit(full, labels)
    if left := full or [name for name, listing in folder.inner.items() if listing.folders]:
        note(f"{len(left)} folders in it are left out, such as {shown(left[0])}: none is named after a label")
    return None
