"""Reading files that may be anything: opened once, without blocking, and bounded."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from adavit.errors import InputError, shown

__all__ = ["open_regular", "parse_json", "path_of", "read_arrays", "read_labels", "read_regular"]

MOST_LABELS = 16 << 20
"""Bytes of a file of labels."""
DEEPEST = 32
"""Levels of JSON."""
SPECIAL = (
    (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"),
)  # fmt: skip


def path_of(value: object, what: str) -> Path:
    """A path that a caller gave, of `what`.

    Raises:
        InputError: it is no str or path-like object of one, or no file can have it.
    """
    try:
        path = Path(value)  # type: ignore[arg-type]
        if b"\0" in os.fsencode(path):
            raise ValueError
    except ValueError:
        raise InputError(f"{what} is {shown(value)}: no file can have this path") from None
    except Exception:  # TypeError of what is no path, and a foreign __fspath__ raises anything
        raise InputError(f"{what} is {shown(value)}: expected a path, as str or pathlib.Path") from None
    return path


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
        kind = next((name for test, name in SPECIAL if test(found.st_mode)), "special file")
        raise OSError(errno.EINVAL, f"is not a regular file but a {kind}", str(path))


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


def parse_json(text: str) -> Any:
    """The value that JSON text holds; stricter than Python, which takes what other readers read otherwise.

    Raises:
        ValueError: it is no JSON, names a key twice in an object, has a number that is not finite, or is nested too
            deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value]
    for _ in range(DEEPEST):  # what is deeper could be read here, and not be written elsewhere
        level = [part for whole in level if isinstance(whole, dict | list) for part in _parts(whole)]
    if level:
        raise ValueError("it is nested too deep")
    return value


def _parts(whole: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return whole.values() if isinstance(whole, dict) else whole


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a key twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it has a number that is not finite")
    return value


def read_arrays(source: Path | BytesIO, names: Iterable[str], most: int) -> list[npt.NDArray[Any]]:
    """Arrays of an .npz file, which may be hostile.

    Args:
        source: its path, or its bytes.
        names: of the arrays.
        most: bytes that all of it may take, unpacked.

    Raises:
        ValueError: it is no such file, lacks one of them, or is larger.
    """
    try:
        with source if isinstance(source, BytesIO) else open_regular(source) as file:
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
