"""Writing without leaving halves behind: beside the target first, then renamed over it."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from adavit.errors import InputError, shown

__all__ = [
    "check_place",
    "folder_beside",
    "open_regular",
    "path_of",
    "read_arrays",
    "read_labels",
    "sha256",
    "write_beside",
]


def sha256(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


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
        with zipfile.ZipFile(path) as packed:
            size = sum(member.file_size for member in packed.infolist())
        if size > most:
            raise ValueError(f"it takes {size} bytes unpacked, over {most}")
        with np.load(path, allow_pickle=False) as data:
            return [data[name] for name in names]
    except Exception as error:  # a damaged archive raises anything
        raise ValueError(str(error)) from None


def read_labels(path: Path) -> list[str]:
    """The lines of a text file, stripped; blank ones are kept.

    Raises:
        InputError: it cannot be read as text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
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
    killed process left is put back or swept up by the next call.
    """
    path = path.absolute()
    old = path.parent / f".{path.name}.old"
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


def _sweep(path: Path, old: Path) -> None:
    """Puts back a folder that was renamed aside and not replaced; removes what dead processes left."""
    if old.exists() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)
    _remove_left(path)


def _remove_left(path: Path) -> None:
    """Removes what dead processes left of files and folders that were to become `path`; other hosts see to theirs."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        host, process = left.name.split(".")[-3:-1]
        if host != _host() or not process.isdecimal() or _alive(int(process)):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


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
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading, without waiting for anybody who writes to it.

    Raises:
        OSError: it is a folder, a FIFO, a device or a socket, or cannot be opened.
        ValueError: no file can have this path.
    """
    _check_regular(os.stat(path).st_mode, path)  # opening a device may do something
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    handle = os.open(path, flags)
    try:
        _check_regular(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_regular(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def path_of(value: object, what: str) -> Path:
    """A path that a caller gave, of `what`.

    Raises:
        InputError: it is no str or path-like object of one, or no file can have it.
    """
    try:
        path = Path(value)  # type: ignore[arg-type]
        if b"\0" in os.fsencode(path):
            raise ValueError
    except TypeError:
        raise InputError(f"{what} is {shown(value)}: expected a path, as str or pathlib.Path") from None
    except ValueError:
        raise InputError(f"{what} is {shown(value)}: no file can have this path") from None
    return path
