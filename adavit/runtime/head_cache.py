"""The weights of kept heads, kept so that a set of heads that comes again costs no copy."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy.typing as npt

from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Arrays
from adavit.bundle.keys import BlockKey
from adavit.runtime.forks import renew_in_fork

__all__ = ["HeadCache", "in_file"]

T = TypeVar("T")

RELEASED = 128 << 20
"""Bytes that are copied until the system may take back the file's memory that they came from."""


class HeadCache(Generic[T]):
    """What a backend makes of the weights of heads, within a budget of bytes.

    What is put out when the budget is full is chosen at random: images that come in cycles would find nothing left of
    what was used least recently. Any thread may use it.

    Args:
        graphs: have the weights.
        make: what is kept of them.
        budget: bytes to keep at most.
    """

    def __init__(self, graphs: Graphs, make: Callable[[Arrays], Mapping[str, T]], budget: int) -> None:
        self._graphs, self._make, self._budget = graphs, make, budget
        self._kept: dict[BlockKey, tuple[Mapping[str, T], int]] = {}
        self._bytes = self._taken = 0
        self._random = random.Random(0)
        self.after_fork()
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Makes the lock, in a forked child anew."""
        self._lock = threading.Lock()

    def of(self, key: BlockKey) -> Mapping[str, T]:
        """What is made of the weights that a block's graph is handed for a key."""
        found = self._kept.get(key)
        if found is None:
            arrays = self._graphs.head_weights(key)
            size = sum(_own_bytes(array) for array in arrays.values())
            found = self._make(arrays), size
            self._keep(key, found)
            self._taken += size
            if self._taken >= RELEASED:
                self._taken = 0
                self._graphs.tensors.release()
        return found[0]

    def _keep(self, key: BlockKey, found: tuple[Mapping[str, T], int]) -> None:
        size = found[1]
        with self._lock:
            if size > self._budget or key in self._kept:
                return
            while self._bytes + size > self._budget:
                _, put_out = self._kept.pop(self._random.choice(list(self._kept)))
                self._bytes -= put_out
            self._kept[key] = found
            self._bytes += size


def in_file(array: npt.NDArray[Any]) -> bool:
    """Whether an array is in the weights' own memory, which all sets of heads share."""
    return array.base is not None and not array.flags.writeable


def _own_bytes(array: Any) -> int:
    """Of an array that is not in the weights' own memory."""
    return 0 if in_file(array) else int(array.nbytes)
