"""Keeps gathered weights, so that a set of heads that comes again costs no copy."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["HeadWeights"]

Arrays = list[npt.NDArray[np.float32]]
Key = tuple[int, str, bytes]


class HeadWeights:
    """Weights by (block, sub-layer, set of heads), within a budget of bytes.

    What is put out when the budget is full is chosen at random: images that come in cycles would find nothing
    left of what was used least recently. May be used from many threads.

    Args:
        budget: bytes to keep at most.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: dict[Key, Arrays] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        self._random = random.Random(0)

    def get(self, key: Key, make: Callable[[], Arrays]) -> Arrays:
        """The weights of `key`, made if they are not there."""
        found = self._kept.get(key)
        if found is None:
            found = make()
            self._keep(key, found)
        return found

    def _keep(self, key: Key, arrays: Arrays) -> None:
        size = _size(arrays)
        with self._lock:
            if size > self._budget or key in self._kept:
                return
            while self._bytes + size > self._budget:
                self._bytes -= _size(self._kept.pop(self._random.choice(list(self._kept))))
            self._kept[key] = arrays
            self._bytes += size


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)
