"""Finding image files in folders, which may be labelled sets of class folders."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from adavit.errors import InputError, bounded, shown
from adavit.reading import path_of
from adavit.runtime.class_folders import Classes, ClassFolderError, Kind, match_folders, misfit

__all__ = ["ImageFile", "find_calibration_images", "find_images", "labels_by"]

Note = Callable[[str], None]

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


@dataclass(frozen=True)
class _Listing:
    """What a folder holds, by name: images, folders, and what looks like an image and is no regular file."""

    images: list[Path]
    folders: list[Path]
    odd: list[str]

    def files(self, note: Note, label: int | None = None, by: Kind | None = None) -> Iterator[ImageFile]:
        """The images; `note` is told of the odd ones."""
        if self.odd:
            note(f"{len(self.odd)} files are left out, such as {shown(self.odd[0])}: they are no regular files")
        return (ImageFile(path, label, by) for path in self.images)


def _listed(folder: Path) -> _Listing:
    known, listing = Image.registered_extensions(), _Listing([], [], [])
    try:
        with os.scandir(folder) as entries:
            ordered = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); give other images, or access") from None
    for entry in ordered:
        path = folder / entry.name
        if _holds(entry.is_dir):
            listing.folders.append(path)
        elif path.suffix.lower() in known:
            if _holds(entry.is_file):
                listing.images.append(path)
            else:
                listing.odd.append(entry.name)
    return listing


def _holds(test: Callable[[], bool]) -> bool:
    """Whether it is so of an entry, which may be a link to what cannot be reached."""
    try:
        return test()
    except OSError:
        return False


def _in_folder(folder: Path, labels: Sequence[str] | None, by_order: bool, note: Note) -> list[ImageFile]:
    """The images of a folder, or of the class folders in it."""
    top = _listed(folder)
    inner = {path.name: _listed(path) for path in top.folders}
    if not top.images and not any(listing.images for listing in inner.values()):
        raise InputError(f"{folder}: holds no image file")
    if labels is None:
        return [file for listing in (top, *inner.values()) for file in listing.files(note)]
    try:
        classes = _classes(top, inner, labels, by_order, note)
    except ClassFolderError as error:
        raise ClassFolderError(f"{folder}: {error}") from None
    if classes is None:
        return list(top.files(note))
    found: list[ImageFile] = []
    for name, label in classes.index.items():
        found += inner[name].files(note, label, classes.by)
    _tell_left_out(top, [inner[name] for name in classes.index], note)
    return found


def _classes(
    top: _Listing, inner: dict[str, _Listing], labels: Sequence[str], by_order: bool, note: Note
) -> Classes | None:
    """What the folders in a folder stand for; None where its own images are meant."""
    full = [name for name, listing in inner.items() if listing.images]
    if full:
        classes = match_folders(list(inner), labels, by_order, frozenset(inner) - frozenset(full), note)
        if classes:
            return classes
        if not top.images:
            raise misfit(full[0], len(inner), labels)
    if left := full or [name for name, listing in inner.items() if listing.folders]:
        note(f"{len(left)} folders in it are left out, such as {shown(left[0])}: none is named after a label")
    return None


def _tell_left_out(top: _Listing, classes: list[_Listing], note: Note) -> None:
    """Notes what of a labelled set is in no class folder, or too deep in one."""
    if top.images or top.odd:
        note(f"{len(top.images) + len(top.odd)} images beside the class folders are left out")
    if deeper := [path for listing in classes for path in listing.folders]:
        note(f"{len(deeper)} folders inside class folders are left out, such as {shown(deeper[0].name)}")
