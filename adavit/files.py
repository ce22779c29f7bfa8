"""Reading what may be hostile, and writing without leaving halves: beside the target first, then renamed over it."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from adavit.errors import InputError

__all__ = [
    "check_place",
    "find_folder",
    "folder_beside",
    "open_regular",
    "read_arrays",
    "read_labels",
    "read_regular",
    "sha256",
    "write_beside",
]

MOST_LABELS = 16 << 20
"""Bytes of a file of labels."""
REPLACING = 2.0
"""Seconds to wait for a process that is between the two renames of a replacement."""


def sha256(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading, once, without blocking; a symbolic link is followed.

    Raises:
        OSError: it is not there, may not be read, or is no regular file, with a `strerror` that says which.
        ValueError: no file can have this path.
    """
    _require_regular(os.stat(path), path)  # opening a device may do something
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(os.fstat(handle), path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _require_regular(found: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def read_regular(path: str | Path, most: int) -> bytes:
    """All bytes of a regular file; see `open_regular`.

    Raises:
        OSError: it cannot be read, or holds more than `most` bytes.
        ValueError: no file can have this path.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most or len(data := file.read(most + 1)) > most:
            raise OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
    return data


def read_arrays(path: Path, names: Iterable[str], most: int) -> list[npt.NDArray[Any]]:
    """Arrays of an .npz file, which may be hostile.

    Args:
        path: of the file.
        names: of the arrays.
        most: bytes that all of it may take, unpacked.

    Raises:
        ValueError: it is no such file, lacks one of them, or is larger.
    """
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as packed:
                size = sum(member.file_size for member in packed.infolist())
            if size > most:
                raise ValueError(f"it takes {size} bytes unpacked, over {most}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as data:
                return [data[name] for name in names]
    except Exception as error:  # a damaged archive raises anything
        raise ValueError(str(error)) from None


def read_labels(path: Path) -> list[str]:
    """The lines of a text file, stripped; blank ones are kept.

    Raises:
        InputError: it cannot be read as text.
    """
    try:
        return [line.strip() for line in read_regular(path, MOST_LABELS).decode("utf-8-sig").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read as labels ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as labels ({type(error).__name__})") from None


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


def find_folder(path: str | Path) -> Path:
    """Where the folder that belongs at `path` is.

    That is `path`, but where a process was killed between the two renames of a replacement: then the old folder is put
    back first or, where this process may not do that, found where it lies. A living process is waited for.

    Raises:
        TypeError, ValueError: no folder can have this path.
    """
    path = Path(path)
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
