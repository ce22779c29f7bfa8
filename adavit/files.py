"""Writing without leaving halves behind: beside the target first, then renamed over it."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

__all__ = [
    "check_place",
    "find_folder",
    "folder_beside",
    "sha256",
    "write_beside",
]

REPLACING = 2.0
"""Seconds to wait for a process that is between the two renames of a replacement."""


def sha256(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def check_place(path: Path) -> None:
    """Raises OSError, which names `path` and says what to do, where no file can be."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write into; make it first", str(path))


@contextmanager
def write_beside(path: Path) -> Iterator[IO[Any]]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    What a killed process left is swept up by the next call. A device or a pipe is written to as it is.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    check_place(path)
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    _remove_left(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".{_host()}.{os.getpid()}.tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder that becomes `path` when the block ends well, and vanishes when it does not.

    A folder already at `path` is renamed aside for the instant between two renames, then deleted. What a
    killed process left is put back by `find_folder` or the next call, or swept up by that.
    """
    path = path.absolute()
    old = _aside(path)
    _sweep(path, old)
    fresh = path.parent / f".{path.name}.{_host()}.{os.getpid()}.tmp"
    fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            os.rename(path, old)
        os.rename(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        _sweep(path, old)


def find_folder(path: Path) -> Path:
    """Where the folder that belongs at `path` is.

    That is `path`, but where a process was killed between the two renames of a replacement: then the old folder is put
    back first or, where this process may not do that, found where it lies. A living process is waited for.
    """
    place = Path(os.path.realpath(path))
    old = _aside(place)
    until = time.monotonic() + REPLACING
    with suppress(OSError):  # where nothing can be seen, nothing can be put back
        while not place.exists() and old.is_dir():
            if any(_is_live(left) for left in _left(place)) and time.monotonic() < until:
                time.sleep(0.01)
                continue
            try:
                os.rename(old, place)
            except OSError:
                return path if place.exists() else old
    return path


def _aside(path: Path) -> Path:
    """Where the folder at `path` goes for the instant between two renames."""
    return path.parent / f".{path.name}.old"


def _sweep(path: Path, old: Path) -> None:
    """Puts back a folder that was renamed aside and not replaced; removes what dead processes left."""
    if old.exists() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)
    _remove_left(path)


def _remove_left(path: Path) -> None:
    """Removes what dead processes left of files and folders that were to become `path`; other hosts see to theirs."""
    for left in _left(path):
        if _is_live(left):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _left(path: Path) -> Iterator[Path]:
    """The files and folders of this host that are, or were, to become `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        host, process = left.name.split(".")[-3:-1]
        if host == _host() and process.isdecimal():
            yield left


def _is_live(left: Path) -> bool:
    """Whether the process that makes one of `_left` is alive."""
    return _alive(int(left.name.split(".")[-2]))


@cache
def _host() -> str:
    """Stands for where process ids are this process's: the host, and on Linux the container."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = ""
    return sha256(f"{platform.node()} {numbering}".encode())[:8]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # a number that no process has
        return False
    except PermissionError:
        pass
    return True
