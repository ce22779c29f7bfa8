"""What callers give, checked: numbers, flags, names and sequences."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from operator import index
from typing import Any

import numpy as np

from adavit.errors import OptionError, shown

__all__ = ["choice", "each", "flag", "number", "plain", "whole"]


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number that a caller gave, Python's or numpy's.

    Raises:
        OptionError: it is none, or out of bounds.
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
    raise OptionError(f"{name} is {shown(value)}: expected a whole number {bounds}")


def number(name: str, value: Any, least: float, most: float = math.inf, above: bool = False) -> float:
    """A finite number that a caller gave, Python's or numpy's, above the least where that is said.

    Raises:
        OptionError: it is none, or out of bounds.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        found = float(value)
        if math.isfinite(found) and least <= found <= most and not (above and found == least):
            return found
    bounds = f"{'above' if above else 'from'} {least:g}" + (f" to {most:g}" if most < math.inf else "")
    raise OptionError(f"{name} is {shown(value)}: expected a number {bounds}")


def flag(name: str, value: Any) -> bool:
    """True or False, as a caller gave it; raises OptionError for anything else."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {shown(value)}: expected True or False")
    return value


def choice(name: str, value: Any, names: Collection[str]) -> str:
    """One of some names, as a caller gave it; raises OptionError for anything else."""
    if not isinstance(value, str) or value not in names:
        raise OptionError(f"{name} is {shown(value)}: choose from {', '.join(names)}")
    return value


def each(name: str, values: Any, expected: str, *alone: type) -> tuple[Any, ...]:
    """The values of a sequence that a caller gave, or one that is given alone, numbers as Python's.

    Args:
        name: what they are.
        values: what was given.
        expected: what it should be, for the message.
        alone: types of one that is given alone.

    Raises:
        OptionError: it is neither.
    """
    values = plain(values)
    if isinstance(values, alone):
        return (values,)
    try:
        if isinstance(values, str | bytes):
            raise TypeError
        return tuple(map(plain, values))
    except TypeError:
        raise OptionError(f"{name} is {shown(values)}: expected {expected}") from None


def plain(value: Any) -> Any:
    """A value that may be a number or flag of numpy's, as Python's."""
    return value.item() if isinstance(value, np.generic) else value
