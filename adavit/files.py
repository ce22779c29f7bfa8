"""Writing without leaving halves behind: beside the target first, then renamed over it."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import re
import secrets
import shutil
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

BESIDE = re.compile(r"\.[0-9a-f]{8}\.[0-9a-f]{8}\.[0-9]{1,20}\.(tmp|old)")
"""What follows the name of what is written: chance, host and process, and what it is."""
TRIES = 20
"""Replacements of a folder that others put back each time."""
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
    beside = _beside(path, "tmp")
    with _making(beside, path):
        try:
            with beside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder that becomes `path` when the block ends well, and vanishes when it does not.

    A folder already at `path` is renamed aside for the instant between two renames, then deleted. What a
    killed process left is put back by `find_folder` or the next call, or swept up by that.
    """
    path = find_folder(path.absolute())
    _remove_left(path)
    fresh = _beside(path, "tmp")
    with _making(fresh, path):
        fresh.mkdir()
        try:
            yield fresh
            _replace(path, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            _remove_left(path)


def _replace(path: Path, fresh: Path) -> None:
    """Renames a folder to `path`; the one that is there goes aside first, from where others may put it back."""
    for tries_left in reversed(range(TRIES)):
        aside = _beside(path, "old")
        with _making(aside, path):
            try:
                with suppress(FileNotFoundError):
                    os.rename(path, aside)
                os.rename(fresh, path)
                return
            except OSError as error:
                if not tries_left or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            finally:
                if aside.exists() and not path.exists():
                    os.rename(aside, path)
                shutil.rmtree(aside, ignore_errors=True)


def find_folder(path: Path) -> Path:
    """Where the folder that belongs at `path` is.

    That is `path`, but where a process was killed between the two renames of a replacement: then the old folder is put
    back first or, where this process may not do that, found where it lies. A living process is waited for.
    """
    place = Path(os.path.realpath(path))
    until = time.monotonic() + REPLACING
    with suppress(OSError):  # where nothing can be seen, nothing can be put back
        while not place.exists() and (aside := [left for left in _left(place) if left.suffix == ".old"]):
            if not all(map(_is_dead, aside)) and time.monotonic() < until:
                time.sleep(0.01)
                continue
            old = max(aside, key=lambda left: left.stat().st_ctime_ns)
            try:
                os.rename(old, place)
            except OSError:
                return path if place.exists() else old
    return path


_made: set[str] = set()
"""The names of what this process makes at present."""


def _beside(path: Path, kind: str) -> Path:
    """A new name beside `path`, for what is to become it ("tmp") or for what it was ("old")."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.{_host()}.{os.getpid()}.{kind}"


@contextmanager
def _making(beside: Path, path: Path) -> Iterator[None]:
    """Marks a file or folder as one that this process needs; errors name `path`, which it is made for."""
    _made.add(beside.name)
    try:
        yield
    except OSError as error:
        if str(error.filename) == str(beside):
            error.filename = str(path)
        raise
    finally:
        _made.discard(beside.name)


def _remove_left(path: Path) -> None:
    """Removes what dead processes of this host left of what was to become `path`, or was it before."""
    kinds = (".tmp", ".old") if path.exists() else (".tmp",)
    for left in _left(path):
        if left.suffix not in kinds or not _is_dead(left):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _left(path: Path) -> Iterator[Path]:
    """The files and folders that `_beside` named after `path`, on any host."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if BESIDE.fullmatch(left.name.removeprefix(f".{path.name}")):
            yield left


def _is_dead(left: Path) -> bool:
    """Whether the process that made one of `_left` is known to be gone, and is not of another host."""
    host, process = left.name.split(".")[-3:-1]
    if host != _host():
        return False
    return left.name not in _made if int(process) == os.getpid() else not _alive(int(process))


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
