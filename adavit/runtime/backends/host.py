"""Moving rows between buffers in host memory, for the backends that run on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from adavit.runtime.backend import Sizes

__all__ = ["HostBuffer", "HostMoves"]

Index = npt.NDArray[np.intp]


class HostBuffer(Protocol):
    """A buffer whose memory is an array."""

    array: npt.NDArray[Any]


class HostMoves:
    """What `Backend` says of moving rows, in numpy; a backend adds `buffer`."""

    on_host = True

    def upload(self, array: npt.NDArray[Any]) -> Any:
        """See `Backend.upload`."""
        buffer: Any = self.buffer(array.shape, array.dtype.name)  # type: ignore[attr-defined]
        buffer.array[...] = array
        return buffer

    def gather(self, source: HostBuffer, kept: Index, into: HostBuffer) -> None:
        """See `Backend.gather`."""
        source.array.take(kept, 0, out=into.array[: len(kept)], mode="clip")

    def scatter(self, rows: HostBuffer, kept: Index, into: HostBuffer) -> None:
        """See `Backend.scatter`."""
        into.array[kept] = rows.array[: len(kept)]

    def add(self, source: HostBuffer, count: int, vectors: HostBuffer, index: int, into: HostBuffer) -> None:
        """See `Backend.add`."""
        np.add(source.array[:count], vectors.array[index], out=into.array[:count])

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`: as many."""
        return tokens

    def prepare(self, used: Mapping[Sizes, float]) -> Mapping[Sizes, float]:
        """See `Backend.prepare`: nothing."""
        return {}

    def timings(self) -> dict[str, float]:
        """See `Backend.timings`: there is nothing to tell."""
        return {}

    def fetch(self, *buffers: HostBuffer) -> tuple[npt.NDArray[Any], ...]:
        """See `Backend.fetch`."""
        return tuple(buffer.array for buffer in buffers)
