"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = ["trim_heap"]


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where the C library has none."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


def trim_heap() -> None:
    """Gives memory back that the heap holds between what is in use: making a session leaves megabytes of it."""
    if trim := _trim():
        trim(0)
