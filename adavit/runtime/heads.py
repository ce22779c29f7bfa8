"""What engines are told of chosen heads, kept so that a set of heads that comes again costs no copy."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.runtime.backend import Backend, Buffer, Engine
from adavit.runtime.bundle import Bundle
from adavit.runtime.forks import renew_in_fork

__all__ = ["HeadWeights"]

Index = npt.NDArray[np.intp]
Key = tuple[int, str, bytes]
Gathered = list[tuple[Buffer, int]]

SETS = 4096
"""Sets of heads whose numbers and channels are kept; a few KB each."""


class HeadWeights:
    """Weights by block, sub-layer and set of heads, within a budget of bytes.

    What is put out when the budget is full is chosen at random: images that come in cycles would find nothing
    left of what was used least recently. May be used from many threads.

    Args:
        bundle: describes what the engines that gather make.
        backend: makes the buffers.
        engines: what gathers them, for each block by sub-layer.
        budget: bytes to keep at most.
    """

    def __init__(self, bundle: Bundle, backend: Backend, engines: Sequence[Mapping[str, Engine]], budget: int) -> None:
        self._bundle = bundle
        self._backend = backend
        self._engines = engines
        self._budget = budget
        self._kept: dict[Key, Gathered] = {}
        self._named: dict[bytes, tuple[Any, Any]] = {}
        self._of: dict[tuple[int, bytes], list[Any]] = {}
        self._bytes = 0
        self._random = random.Random(0)
        self.after_fork()
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Makes the lock, in a forked child anew."""
        self._lock = threading.Lock()

    def without_budget(self) -> HeadWeights:
        """Weights that are gathered every time, as those of new sets of heads are."""
        return HeadWeights(self._bundle, self._backend, self._engines, 0)

    def named(self, heads: Index) -> tuple[Any, Any]:
        """As rows of buffers, the heads' numbers [h], and for each channel [D] whether it is theirs, 1 or 0."""
        key = heads.tobytes()
        found = self._named.get(key)
        if found is None:
            arch = self._bundle.architecture
            channels = np.zeros((arch.heads, arch.head_width), np.float32)
            channels[heads] = 1
            numbers, kept = self._backend.upload(heads), self._backend.upload(channels.ravel())
            if len(self._named) >= SETS:
                self._named.clear()
            found = self._named[key] = numbers.rows(len(heads)), kept.rows(arch.width)
        return found

    def attention(self, block: int, heads: Index) -> list[Any]:
        """Rows of what a block's attention needs of these heads, as `attention_weights` makes it."""
        return self._get(block, "attention", heads)

    def mlp(self, block: int, heads: Index) -> list[Any]:
        """Rows of what a block's MLP needs of these heads, as `mlp_weights` makes it."""
        return self._get(block, "mlp", heads)

    def of(self, block: int, choices: bytes) -> Sequence[Any] | None:
        """What a block's engine for any heads is given; see `FixedEngine.bound`. None where no head is kept.

        Args:
            block: its position.
            choices: whether it keeps each head, then each sub-layer: the bytes of bool [H + 2].
        """
        found = self._of.get((block, choices))
        if found is None:
            kept = np.frombuffer(choices, bool)
            heads, (attention, mlp), found = kept[:-2].nonzero()[0], kept[-2:], []
            if not len(heads):
                return None
            if self._bundle.architecture.adapts_heads(block):
                found += self.attention(block, heads) if attention else []
                found += [self.named(heads)[0], *self.mlp(block, heads)] if mlp else []
            if len(self._of) >= SETS:
                self._of.clear()
            self._of[block, choices] = found
        return found

    def _get(self, block: int, kind: str, heads: Index) -> list[Any]:
        key = block, kind, heads.tobytes()
        found = self._kept.get(key)
        if found is None:
            found = self._gather(block, kind, heads)
            self._keep(key, found)
        return [buffer.rows(count) for buffer, count in found]

    def _gather(self, block: int, kind: str, heads: Index) -> Gathered:
        """The weights of heads, as new buffers with their number of rows."""
        engine, found = self._engines[block][kind], []
        for tensor in engine.spec.outputs:
            shape = tensor.of_heads(len(heads), self._bundle.architecture.head_width)
            found.append((self._backend.buffer(shape, tensor.dtype), shape[0]))
        engine.run([heads], [buffer.rows(count) for buffer, count in found])
        return found

    def _keep(self, key: Key, found: Gathered) -> None:
        size = _size(found)
        with self._lock:
            if size > self._budget or key in self._kept:
                return
            if self._bytes + size > self._budget:
                self._of.clear()
            while self._bytes + size > self._budget:
                self._bytes -= _size(self._kept.pop(self._random.choice(list(self._kept))))
            self._kept[key] = found
            self._bytes += size


def _size(found: Gathered) -> int:
    return sum(buffer.nbytes for buffer, _ in found)
