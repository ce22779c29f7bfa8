"""Labelled images: folders of class-named folders, and the IDX files of the MNIST family."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from adavit.bundle.preprocessing import decode, open_image
from adavit.datasets.class_folders import Classes, ClassFolderError, Kind, match_folders, misfit
from adavit.datasets.folder_listing import ImageFolder, list_images
from adavit.errors import InputError
from adavit.files import sha256
from adavit.training.errors import DataError
from adavit.training.idx import read_idx

__all__ = ["FolderImages", "IdxImages", "LabelledImages", "Pixels", "open_images"]

Pixels = npt.NDArray[np.uint8]

FOLDERS = {"train": ("train",), "test": ("val", "test")}
IDX_PREFIX = {"train": "train", "test": "t10k"}


class LabelledImages(Protocol):
    """A finite set of images with classes.

    Attributes:
        classes: the class names; a label is an index into it.
        labels: int64 [n].
        labels_by: what tells an image's class: the "name", the "number" or the "order" of its folder, or its number.
    """

    classes: list[str]
    labels: npt.NDArray[np.int64]
    labels_by: Kind

    def pixels(self, index: int) -> Pixels:
        """One image, uint8 [height, width, 3]."""
        ...

    def sizes(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Width and height of some images, in pixels."""
        ...

    @property
    def identity(self) -> str:
        """What tells these images from others, in words, wherever they lie."""
        ...


class IdxImages:
    """Images of one IDX pair, held in memory; grey ones are replicated to three channels."""

    labels_by: Kind = "number"

    def __init__(self, images: Path, labels: Path, classes: list[str] | None = None) -> None:
        self._images = read_idx(images)
        self.labels = read_idx(labels).astype(np.int64)
        shape = self._images.shape
        if not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)) or 0 in shape:
            raise DataError(f"{images}: shape {list(shape)}: expected [images, height, width] or [..., 3]")
        if self.labels.shape != shape[:1]:
            raise DataError(f"{labels}: {self.labels.size} labels for the {shape[0]} images of {images.name}")
        found = int(self.labels.max()) + 1
        self.classes = [str(label) for label in range(found)] if classes is None else classes
        if found > len(self.classes):
            raise DataError(f"{labels}: label {found - 1} but {len(self.classes)} class names; give one name a class")

    def pixels(self, index: int) -> Pixels:
        """One image, uint8 [height, width, 3]."""
        image = self._images[index]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)

    def sizes(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Width and height of some images, in pixels, which all share."""
        height, width = self._images.shape[1:3]
        return [(width, height)] * len(indices)

    @property
    def identity(self) -> str:
        """By content."""
        return _identity(self, self._images.tobytes())


class FolderImages:
    """Images of a folder of class-named folders, decoded when asked for; warnings say what else is in it.

    Args:
        folder: holds one folder a class.
        corrupt: "refuse" names the first unreadable file and stops; "skip" warns of each and leaves it out.
        classes: the expected classes, in order, which the folders are matched with by `match_folders`; default the
            names of the folders, sorted, all of which must hold images.
        by_order: whether folders that fit none of the classes, and are as many, are these in sorted order.
    """

    def __init__(
        self, folder: Path, corrupt: str = "refuse", classes: list[str] | None = None, by_order: bool = False
    ) -> None:
        found = list_images(folder)
        if classes is None and found.empty:
            raise _no_image(folder / min(found.empty))
        odd = [path for listing in found.inner.values() for path in listing.odd]
        if odd and corrupt == "refuse":
            raise DataError(f"{odd[0]}: is no regular file; remove it or pass --corrupt skip")
        self.classes = list(found.inner) if classes is None else classes
        matched = _match(found, self.classes, by_order)
        self.labels_by: Kind = matched.by
        self._folder = folder
        self._files: list[Path] = []
        labels: list[int] = []
        for name in found.full:
            readable = [file for file in found.inner[name].images if _accept(file, corrupt)]
            if not readable:
                raise _no_image(folder / name)
            self._files += readable
            labels += [matched.index[name]] * len(readable)
        if not self._files:
            raise DataError(f"{folder}: no class-named folders with images in it")
        self.labels = np.array(labels, np.int64)

    def pixels(self, index: int) -> Pixels:
        """One image, uint8 [height, width, 3], whatever its mode, upright.

        Raises:
            DataError: it cannot be read; the message names it.
        """
        with _refused():
            return np.asarray(decode(self._files[index]))

    def sizes(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Width and height of some images as they are stored, in pixels, by their headers alone."""
        found = []
        for index in indices:
            with _refused(), open_image(self._files[index]) as image:
                found.append(image.size)
        return found

    @property
    def identity(self) -> str:
        """By the names and sizes of the files."""
        files = (f"{file.relative_to(self._folder).as_posix()} {file.stat().st_size}" for file in self._files)
        return _identity(self, "\n".join(files).encode())


def _match(found: ImageFolder, classes: list[str], by_order: bool) -> Classes:
    """The classes of the folders in a folder; warns of what is left out."""

    def note(text: str) -> None:
        warnings.warn(f"{found.path}: {text}", stacklevel=2)

    unfit, matched = "is not one of the {} known classes", None
    try:
        if found.full:
            matched = match_folders(list(found.inner), classes, by_order, found.empty, note, unfit)
            if matched is None:
                raise misfit(found.full, classes, unfit)
    except ClassFolderError as error:
        raise DataError(f"{found.path}: {error}") from None
    matched = matched or Classes({}, "name")
    found.tell_set(matched.index, note)
    return matched


def _no_image(folder: Path) -> DataError:
    return DataError(f"{folder}: no readable image for this class; add some or remove the folder")


def _identity(data: LabelledImages, content: bytes) -> str:
    known = json.dumps([data.classes, data.labels.tolist(), sha256(content)])
    return f"{len(data.labels)} images of {len(data.classes)} classes ({sha256(known.encode())[:16]})"


@contextmanager
def _refused() -> Iterator[None]:
    """What is wrong with an image, with what to do about it."""
    try:
        yield
    except InputError as error:
        raise DataError(f"{error}; remove it or pass --corrupt skip") from None


def _accept(file: Path, corrupt: str) -> bool:
    """Whether to use a file. Refusing looks at what is cheap to check; skipping must decode all, to be sure."""
    if corrupt == "refuse":
        with _refused(), open_image(file) as image:
            image.verify()
        return True
    try:
        decode(file)
    except InputError as error:
        warnings.warn(f"skipped: {error}", stacklevel=2)
        return False
    return True


@dataclass(frozen=True)
class _IdxPair:
    images: Path
    labels: Path


def _find_idx(folder: Path, part: str) -> _IdxPair | None:
    for suffix in ("", ".gz"):
        stem = folder / IDX_PREFIX[part]
        pair = _IdxPair(Path(f"{stem}-images-idx3-ubyte{suffix}"), Path(f"{stem}-labels-idx1-ubyte{suffix}"))
        if pair.images.exists():
            return pair
    return None


def open_images(
    folder: Path, part: str, corrupt: str = "refuse", classes: list[str] | None = None, by_order: bool = False
) -> LabelledImages:
    """The "train" or "test" part of a data set.

    Args:
        folder: holds MNIST-style IDX files, or the folders `train` and `val` (or `test`) of class-named folders.
        part: "train" or "test".
        corrupt: "refuse" or "skip" unreadable files.
        classes: class names in label order, where already known.
        by_order: as of `FolderImages`.

    Raises:
        DataError: nothing usable is there, or there are fewer than two classes.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one with train/ and val/, or with IDX files")
    found: LabelledImages
    if pair := _find_idx(folder, part):
        found = IdxImages(pair.images, pair.labels, classes)
    else:
        parts = [folder / name for name in FOLDERS[part] if (folder / name).is_dir()]
        if not parts:
            wanted = " or ".join(FOLDERS[part])
            raise DataError(f"{folder}: neither IDX files nor a folder {wanted} of class-named folders in it")
        found = FolderImages(parts[0], corrupt, classes, by_order)
    if len(found.classes) < 2:
        raise DataError(f"{folder}: a single class, {found.classes[0]!r}; there is nothing to learn to tell apart")
    return found
