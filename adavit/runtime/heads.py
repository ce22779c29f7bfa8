"""The weights of chosen heads, gathered once and kept, so that a set of heads that comes again costs no copy."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.runtime.backend import Backend, Buffer, Engine
from adavit.runtime.engines import BlockEngines

__all__ = ["HeadWeights"]

Index = npt.NDArray[np.intp]
Key = tuple[int, str, bytes]


class HeadWeights:
    """Weights by block, sub-layer and set of heads, within a budget of bytes.

    What is put out when the budget is full is chosen at random: images that come in cycles would find nothing
    left of what was used least recently. May be used from many threads.

    Args:
        arch: the model's shapes.
        backend: makes the buffers.
        blocks: the engines that gather.
        budget: bytes to keep at most.
    """

    def __init__(self, arch: Architecture, backend: Backend, blocks: Sequence[BlockEngines], budget: int) -> None:
        self._arch = arch
        self._backend = backend
        self._blocks = blocks
        self._budget = budget
        self._kept: dict[Key, list[Buffer]] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        self._random = random.Random(0)

    def attention(self, block: int, heads: Index) -> list[Any]:
        """Of a block's attention: qkv [h, D, 3d], proj [h * d, D] and, where there is one, the bias [h, 1, 3d]."""
        width, d, count = self._arch.width, self._arch.head_width, len(heads)
        shapes: list[tuple[int, ...]] = [(count, width, 3 * d), (count * d, width)]
        if self._arch.qkv_bias:
            shapes.append((count, 1, 3 * d))
        return self._get((block, "attention", heads.tobytes()), self._blocks[block].attention_weights, heads, shapes)

    def mlp(self, block: int, heads: Index) -> list[Any]:
        """Of a block's MLP: fc1 [h * d, hidden]."""
        shapes = [(len(heads) * self._arch.head_width, self._arch.hidden)]
        return self._get((block, "mlp", heads.tobytes()), self._blocks[block].mlp_weights, heads, shapes)

    def _get(self, key: Key, engine: Engine | None, heads: Index, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
        found = self._kept.get(key)
        if found is None:
            assert engine is not None
            found = [self._backend.buffer(shape) for shape in shapes]
            engine.run([heads], _whole(found))
            self._keep(key, found)
        return _whole(found)

    def _keep(self, key: Key, buffers: list[Buffer]) -> None:
        size = _size(buffers)
        with self._lock:
            if size > self._budget or key in self._kept:
                return
            while self._bytes + size > self._budget:
                self._bytes -= _size(self._kept.pop(self._random.choice(list(self._kept))))
            self._kept[key] = buffers
            self._bytes += size


def _whole(buffers: list[Buffer]) -> list[Any]:
    return [buffer.rows(len(buffer.array)) for buffer in buffers]


def _size(buffers: list[Buffer]) -> int:
    return sum(buffer.array.nbytes for buffer in buffers)
