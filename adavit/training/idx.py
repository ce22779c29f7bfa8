"""Reads IDX files, the format of MNIST and its family, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adavit.training.errors import DataError

__all__ = ["read_idx"]

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array an IDX file of unsigned bytes holds.

    The header is two zero bytes, a type code, the number of dimensions, then each size as a big-endian
    32-bit number.

    Raises:
        DataError: the file cannot be read, is truncated, is too long or holds another type.
    """
    try:
        content = path.read_bytes()
        if content[:2] == GZIP_MAGIC:
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE or not 1 <= content[3] <= 4:
        raise DataError(f"{path}: not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path}: truncated IDX header; download it again")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    expected, found = int(np.prod(shape, dtype=object)), len(content) - start
    if found != expected:
        raise DataError(
            f"{path}: {'truncated' if found < expected else 'too long'}: its header promises {expected} bytes, "
            f"it has {found}; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
