"""The quantile that capacities are chosen at, in a bundle: `capacity_quantile` in `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adavit.errors import shown

__all__ = ["CAPACITY_QUANTILE", "capacity_quantile"]

CAPACITY_QUANTILE = 0.985
"""Share of random batches of calibration images that fit, where a bundle does not say."""


def capacity_quantile(config: Mapping[str, Any]) -> float:
    """The quantile that a bundle's description names; raises ValueError unless it is from 0.5 to 1."""
    value = config.get("capacity_quantile", CAPACITY_QUANTILE)
    if type(value) not in (int, float) or not 0.5 <= value <= 1:
        raise ValueError(f"its capacity_quantile is {shown(value)}: expected a number from 0.5 to 1")
    return float(value)
