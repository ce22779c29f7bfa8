"""Numbers that callers give, checked."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np

from adavit.errors import InputError, shown

__all__ = ["whole"]


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number that a caller gave, Python's or numpy's.

    Raises:
        InputError: it is none, or out of bounds.
    """
    if not isinstance(value, bool | np.bool_ | np.ndarray):
        try:
            found = index(value)
        except Exception:  # TypeError of what is no number, and a foreign __index__ raises anything
            pass
        else:
            if least <= found and (most is None or found <= most):
                return found
    bounds = f"from {least} on" if most is None else f"from {least} to {most}"
    raise InputError(f"{name} is {shown(value)}: expected a whole number {bounds}")
