"""Files that a bundle describes, by size and hash, checked before anything is used."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from adavit.errors import BundleError
from adavit.files import sha256
from adavit.reading import open_regular, read_regular

__all__ = ["StoredFile", "check_file", "map_stored", "read_stored"]

PART = 1 << 20
"""Bytes that are hashed at once."""
Buffer = bytes


@dataclass(frozen=True)
class StoredFile:
    """A file of a bundle: its path inside, with forward slashes, its size and its hash."""

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: str, data: Buffer) -> StoredFile:
        """What describes a file with such content."""
        return cls(file, len(data), sha256(data))


def map_stored(folder: Path, stored: StoredFile) -> bytes | mmap.mmap:
    """See `Bundle.map_stored`."""
    path = check_file(folder, stored)
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size != stored.bytes or _hash_of(file) != stored.sha256:
                raise _altered(folder, stored)
            return mmap.mmap(file.fileno(), stored.bytes, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BundleError(f"{folder}/{stored.file}: cannot be read ({error.strerror})") from None


def _hash_of(file: BinaryIO) -> str:
    """The SHA-256 of a file's content, read in parts."""
    digest = hashlib.sha256()
    while part := file.read(PART):
        digest.update(part)
    return digest.hexdigest()


def _altered(folder: Path, stored: StoredFile) -> BundleError:
    return BundleError(
        f"{folder}/{stored.file}: altered since export (SHA-256 differs); copy the bundle or export again"
    )


def read_stored(folder: Path, stored: StoredFile) -> bytes:
    """The bytes of a described file in a folder: opened once, read whole, and hashed; see `Bundle.read_stored`."""
    path = check_file(folder, stored)
    try:
        data = read_regular(path, stored.bytes)
    except OSError as error:
        raise BundleError(f"{folder}/{stored.file}: cannot be read ({error.strerror})") from None
    if len(data) != stored.bytes or sha256(data) != stored.sha256:
        raise _altered(folder, stored)
    return data


def check_file(folder: Path, stored: StoredFile) -> Path:
    """A described file's path, which stays inside, after a look at what is there and its size.

    A symbolic link is as good as a file: what is used are the bytes that have the right hash.
    """
    file = PurePosixPath(stored.file)
    if (
        file.is_absolute()
        or ".." in file.parts
        or not file.parts
        or not stored.file.isprintable()
        or any(c in stored.file for c in "\\:")
    ):
        raise BundleError(f"{folder}: the path {stored.file[:80]!r} leaves the bundle; do not use this bundle")
    path = folder / file
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError where it cannot be encoded
        raise BundleError(f"{folder}/{stored.file}: missing; copy the bundle whole or export again") from None
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{folder}/{stored.file}: is not a regular file")
    if found.st_size != stored.bytes:
        raise BundleError(
            f"{folder}/{stored.file}: {found.st_size} bytes instead of {stored.bytes}; copy the bundle or export again"
        )
    return path
