"""What a folder of images, and the folders in it, hold; and what of that is no image that can be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from adavit.errors import InputError, shown

__all__ = ["ImageFolder", "Listing", "Note", "list_images"]

Note = Callable[[str], None]

QUIET = frozenset(
    (".csv", ".db", ".ini", ".json", ".log", ".md", ".npy", ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip")
)
"""Suffixes of files that lie beside images and are plainly none."""


@dataclass(frozen=True)
class Listing:
    """What a folder holds, by name; what begins with a dot is left out.

    Attributes:
        images: regular files with a suffix that Pillow knows.
        folders: also links that lead nowhere, which may have been links to folders.
        odd: what has an image's suffix and is no regular file.
        unknown: files without an image's suffix, but for `QUIET` ones.
    """

    images: list[Path]
    folders: list[Path]
    odd: list[Path]
    unknown: list[Path]


@dataclass(frozen=True)
class ImageFolder:
    """A folder and, by name, the folders in it."""

    path: Path
    top: Listing
    inner: dict[str, Listing]

    @property
    def full(self) -> list[str]:
        """The folders in it that hold images, sorted."""
        return [name for name, listing in self.inner.items() if listing.images]

    @property
    def empty(self) -> frozenset[str]:
        """The folders in it that hold none."""
        return frozenset(self.inner) - frozenset(self.full)

    def tell_files(self, listings: Iterable[Listing], note: Note) -> None:
        """Notes the files of some of its listings that are no images."""
        used = list(listings)
        for files, why in (
            ([path for listing in used for path in listing.odd], "they are no regular files"),
            ([path for listing in used for path in listing.unknown], "no known image suffix"),
        ):
            if files:
                first = shown(files[0].relative_to(self.path).as_posix())
                note(f"{len(files)} files are left out, such as {first}: {why}")

    def tell_set(self, classes: Iterable[str], note: Note) -> None:
        """Notes what is left out where some of its folders are classes."""
        named = list(classes)
        if beside := len(self.top.images) + len(self.top.odd):
            note(f"{beside} images beside the class folders are left out")
        if vanished := [shown(name) for name in named if name in self.empty]:
            folders, hold = ("folder", "holds") if len(vanished) == 1 else ("folders", "hold")
            note(f"class {folders} {', '.join(vanished)} {hold} no readable image file: left out")
        if others := sorted(self.empty.difference(named)):
            note(f"{len(others)} folders that fit no class and hold no image are left out, such as {shown(others[0])}")
        if deeper := [path for name in named for path in self.inner[name].folders]:
            note(f"{len(deeper)} folders inside class folders are left out, such as {shown(deeper[0].name)}")
        self.tell_files((Listing([], [], [], self.top.unknown), *(self.inner[name] for name in named)), note)


def list_images(folder: Path) -> ImageFolder:
    """Lists a folder and the folders in it; one of these that holds folders alone stands for what is in them.

    Raises:
        InputError: one of them cannot be listed.
    """
    top = _listed(folder)
    return ImageFolder(folder, top, {path.name: _deepened(_listed(path)) for path in top.folders})


def _deepened(listing: Listing) -> Listing:
    """With the images of the folders in it, where it has none of its own: sets have such as `class/images/1.jpg`."""
    if listing.images:
        return listing
    deeper = [_deepened(_listed(folder)) for folder in listing.folders if not folder.is_symlink()]
    left = [folder for folder in listing.folders if folder.is_symlink()]
    return Listing(
        [path for found in deeper for path in found.images],
        [*left, *(path for found in deeper for path in found.folders)],
        [*listing.odd, *(path for found in deeper for path in found.odd)],
        [*listing.unknown, *(path for found in deeper for path in found.unknown)],
    )


def _listed(folder: Path) -> Listing:
    known, listing = Image.registered_extensions(), Listing([], [], [], [])
    try:
        with os.scandir(folder) as entries:
            ordered = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        if folder.is_symlink() and not folder.is_dir():
            return listing
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); give other images, or access") from None
    for entry in ordered:
        path = folder / entry.name
        suffix, is_file = path.suffix.lower(), _holds(entry.is_file)
        if _holds(entry.is_dir):
            listing.folders.append(path)
        elif suffix in known:
            (listing.images if is_file else listing.odd).append(path)
        elif suffix not in QUIET:
            (listing.folders if entry.is_symlink() and not is_file else listing.unknown).append(path)
    return listing


def _holds(test: Callable[[], bool]) -> bool:
    """Whether it is so of an entry, which may be a link to what cannot be reached."""
    try:
        return test()
    except OSError:
        return False
