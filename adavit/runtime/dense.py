"""Models without policies: their dense graph runs, whatever the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adavit.bundle.graphs import Graphs
from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import Policy
from adavit.errors import InputError
from adavit.runtime.backend import Backend, Float
from adavit.runtime.batch import BatchBackend
from adavit.runtime.dispatcher import SIDE_BY_SIDE, Observer
from adavit.runtime.finite import check_logits

__all__ = ["DenseDispatcher", "no_policies"]


def no_policies(bundle: Path, purpose: str) -> InputError:
    """The error for work on policies that a model does not have; the purpose completes "nothing to"."""
    return InputError(
        f"{bundle}: the model has no policies, so there is nothing to {purpose}; adavit-train adapt trains policies "
        "(docs/training.md)"
    )


class DenseDispatcher:
    """Runs images of a model without policies, as `Dispatcher` does those of others.

    Args:
        graphs: the dense graph.
        backend: runs it.
    """

    def __init__(self, graphs: Graphs, backend: Backend | BatchBackend) -> None:
        self._arch, self._path = graphs.architecture, graphs.path
        self._backend = backend

    def run(
        self,
        images: Float,
        offsets: Offsets | Sequence[Offsets],
        replay: Policy | None = None,
        observe: Observer | None = None,
    ) -> tuple[Float, Policy]:
        """Runs images; see `Dispatcher.run`. The policy keeps everything, and there are no blocks to observe.

        Raises:
            InputError: there are offsets, which no decision could follow, or an observer.
        """
        each = [offsets] if isinstance(offsets, Offsets) else offsets
        if any(any(map(any, one.by_block(self._arch.depth))) for one in each):
            raise no_policies(self._path, "add offsets to")
        if observe is not None:
            raise no_policies(self._path, "observe")
        logits = np.empty((len(images), self._arch.classes), np.float32)
        for start in range(0, len(images), SIDE_BY_SIDE):
            some = slice(start, start + SIDE_BY_SIDE)
            logits[some] = self._backend.dense(images[some])
            check_logits(logits[some], "the logits", start)
        return logits, Policy.dense(self._arch, len(images)) if replay is None else replay
