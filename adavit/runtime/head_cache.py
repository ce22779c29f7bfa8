"""The weights of kept heads: those that come often are kept, others are cut into memory that is used again."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Arrays
from adavit.bundle.keys import BlockKey
from adavit.runtime.forks import renew_in_fork

__all__ = ["HeadCache", "Lease", "Scratch", "in_file"]

T = TypeVar("T")

RELEASED = 32 << 20
"""Bytes of weights that are used until the system may take back the file's memory that they are in."""
COUNTED = 4096
"""Keys that are counted at most; where there are more, all counts are halved."""
ALIGNED = 64
"""Bytes to which arrays in a scratch are aligned: a line of the cache."""


class Scratch:
    """Memory for arrays that live as long as a block runs: that the system zeroes new memory costs more than a copy."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """As `numpy.empty`; in this memory where it is large enough, which it is when the same is asked for again."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        start, self._used = self._used, self._used + -(-size // ALIGNED) * ALIGNED
        if self._used > len(self._memory):
            return np.empty(shape, dtype)
        found: npt.NDArray[Any] = self._memory[start : start + size].view(dtype).reshape(shape)
        return found

    def clear(self) -> None:
        """Forgets its arrays, which nobody may use any more."""
        if self._used > len(self._memory):
            self._memory = np.empty(self._used, np.uint8)
        self._used = 0


class Lease(NamedTuple, Generic[T]):
    """What a backend made of the weights of heads, until it is released.

    Attributes:
        values: by the names of a graph's inputs.
        arrays: the weights, which values may not keep alive.
        scratch: where they are; None where they are kept.
    """

    values: Mapping[str, T]
    arrays: Arrays
    scratch: Scratch | None


class HeadCache(Generic[T]):
    """What a backend makes of the weights of heads: kept, within a budget of bytes, for the keys that come most often.

    What may be put out when the budget is full is drawn at random, and stays where it comes as often as what is new.
    Any thread may use it.

    Args:
        graphs: have the weights.
        make: what is kept of them.
        budget: bytes to keep at most.
    """

    def __init__(self, graphs: Graphs, make: Callable[[Arrays], Mapping[str, T]], budget: int) -> None:
        self._graphs, self._make, self._budget = graphs, make, budget
        self._kept: dict[BlockKey, tuple[Lease[T], int]] = {}
        self._often: dict[BlockKey, int] = {}
        self._spare: list[Scratch] = []
        self._bytes = self._used = 0
        self._random = random.Random(0)
        self.after_fork()
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Makes the lock, in a forked child anew."""
        self._lock = threading.Lock()

    def acquire(self, key: BlockKey) -> Lease[T]:
        """What is made of the weights that a block's graph is handed for a key; to be released when it has run."""
        self._often[key] = self._often.get(key, 0) + 1
        found = self._kept.get(key)
        if found is not None:
            return found[0]
        try:
            scratch = self._spare.pop()
        except IndexError:
            scratch = Scratch()
        arrays = self._graphs.head_weights(key, scratch.empty)
        size = sum(array.nbytes for array in arrays.values() if not in_file(array))
        self._count_used(sum(array.nbytes for array in arrays.values()))
        if not self._makes_room(key, size):
            return Lease(self._make(arrays), arrays, scratch)
        arrays = {name: array if in_file(array) else array.copy() for name, array in arrays.items()}
        self._free(scratch)
        lease = Lease(self._make(arrays), arrays, None)
        self._keep(key, lease, size)
        return lease

    def release(self, lease: Lease[T]) -> None:
        """Releases what was acquired; nothing may use it any more."""
        if lease.scratch is not None:
            self._free(lease.scratch)

    def _free(self, scratch: Scratch) -> None:
        scratch.clear()
        self._spare.append(scratch)

    def _count_used(self, size: int) -> None:
        """Counts bytes that were used; see RELEASED."""
        self._used += size
        if self._used >= RELEASED:
            self._used = 0
            self._graphs.tensors.release()

    def _makes_room(self, key: BlockKey, size: int) -> bool:
        """Whether a key came before, and there is room for it, if need be in the place of keys that came less often."""
        with self._lock:
            if len(self._often) > COUNTED:
                self._often = {one: often // 2 for one, often in self._often.items() if often > 1}
            often = self._often.get(key, 0)
            if often < 2 or size > self._budget:
                return False
            while self._bytes + size > self._budget:
                other = self._random.choice(list(self._kept))
                if self._often.get(other, 0) >= often:
                    return False
                self._bytes -= self._kept.pop(other)[1]
        return True

    def _keep(self, key: BlockKey, lease: Lease[T], size: int) -> None:
        with self._lock:
            if key not in self._kept and self._bytes + size <= self._budget:
                self._kept[key] = lease, size
                self._bytes += size


def in_file(array: npt.NDArray[Any]) -> bool:
    """Whether an array is in the weights' own memory, which all sets of heads share."""
    return array.base is not None and not array.flags.writeable
