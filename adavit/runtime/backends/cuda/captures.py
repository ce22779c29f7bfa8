"""Whole batches as CUDA graphs: what can be recorded here, and why not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from adavit.errors import BackendError
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.capture import Executable, Recording
from adavit.runtime.backends.cuda.setter import Setter
from adavit.runtime.batch import CAPACITY, CONDITIONAL

__all__ = ["Captures", "Conditions", "When"]

log = logging.getLogger(__name__)

DECIDES = 1, 3
"""Which of a block's sizes [T, A, K, U], int64, are 0 where no image runs attention, or the MLP."""

Conditions = Sequence[AbstractContextManager[int]]
"""For attention and MLP: inside, what is enqueued on the stream that is returned runs if some image wants it."""
When = Callable[[int], Conditions]
"""Makes conditions on the sizes at an address."""


class Captures:
    """Records batches; what fails once is not tried again.

    Args:
        cuda: the CUDA runtime.
        no_conditions: why there are no engines to run conditionally; None where there are.
        no_graphs: why engines cannot be recorded at all; None where they may be.
    """

    def __init__(self, cuda: Cuda, no_conditions: str | None, no_graphs: str | None = None) -> None:
        self._cuda = cuda
        self._why: dict[str, str] = {} if no_graphs is None else {CAPACITY: no_graphs}
        self._setter: Setter | None = None
        if no_conditions is None:
            try:
                self._setter = Setter(cuda)
            except BackendError as error:
                no_conditions = str(error)
        if no_conditions is not None:
            self._why[CONDITIONAL] = no_conditions

    def close(self) -> None:
        """Frees what sets conditions; no graph may be left."""
        if self._setter is not None:
            self._setter.close()
            self._setter = None

    def why_not(self, way: str) -> str | None:
        """Why a way cannot be gone; without a CUDA graph, capacity enqueues its engines one by one."""
        return None if way == CAPACITY else self._why.get(way)

    def without_graph(self, way: str) -> str | None:
        """Why a way has no CUDA graph; None where it has, or nobody has tried."""
        return self._why.get(way)

    def record(self, way: str, stream: int, enqueue: Callable[[When], None]) -> Executable | None:
        """The CUDA graph of what is enqueued on a stream; None where that cannot be captured here."""
        if way in self._why:
            return None
        try:
            with Recording(self._cuda, stream, self._setter if way == CONDITIONAL else None) as recording:
                enqueue(lambda sizes: _conditions(recording, sizes))
            return recording.instantiate()
        except BackendError as error:
            self.refuse(way, str(error))
            return None

    def refuse(self, way: str, why: str) -> None:
        """Notes that a way cannot be captured here."""
        log.warning("no CUDA graph for %s dispatch: %s", way, why)
        self._why[way] = f"the engines cannot be captured here: {why}"


def _conditions(recording: Recording, sizes: int) -> Conditions:
    conditions = [recording.condition() for _ in DECIDES]
    recording.set([(one, sizes + 8 * place) for one, place in zip(conditions, DECIDES, strict=True)])
    return [recording.when(condition) for condition in conditions]
