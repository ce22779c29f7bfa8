"""The dense model in one graph: the twin of an adaptive model, or all there is of a model without policies."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adavit.errors import InputError
from adavit.runtime.backend import Backend, Engine
from adavit.runtime.budget import Offsets
from adavit.runtime.bundle import Bundle
from adavit.runtime.dispatcher import SIDE_BY_SIDE, Observer
from adavit.runtime.finite import check_logits
from adavit.runtime.forks import renew_in_fork
from adavit.runtime.plan import EnginePlan
from adavit.runtime.policy import Policy

__all__ = ["DenseDispatcher", "DenseGraph", "no_policies"]

Float = npt.NDArray[np.float32]


def no_policies(bundle: Path, purpose: str) -> InputError:
    """The error for work on policies that a model does not have; the purpose completes "nothing to"."""
    return InputError(
        f"{bundle}: the model has no policies, so there is nothing to {purpose}; adavit-train adapt trains policies "
        "(docs/training.md)"
    )


class DenseGraph:
    """The engine `dense` of a bundle. It is loaded when it first runs; any thread may run it.

    Args:
        bundle: where the engine is.
        backend: loads and runs it.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._backend = backend
        self._classes = bundle.architecture.classes
        self._engine: Engine | None = None
        self.after_fork()
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Makes the lock, in a forked child anew."""
        self._lock = threading.Lock()

    def load(self) -> Engine:
        """The engine.

        Raises:
            BundleError: the bundle has none, or its file is not the one that was exported.
            BackendError: the backend refuses it.
        """
        if self._engine is None:
            with self._lock:
                if self._engine is None:
                    self._engine = self._backend.load("dense", alone=True)
        return self._engine

    def run(self, images: Float) -> Float:
        """Runs images float32 [B, 3, S, S]; returns logits float32 [B, C], which may be not finite."""
        engine = self.load()
        logits = self._backend.buffer((len(images), self._classes))
        engine.run([images], [logits.rows(len(images))])
        found: Float = self._backend.fetch(logits)[0]
        return found


class DenseDispatcher:
    """Runs a model without policies. It has what `Runtime` asks of a `Dispatcher`.

    Args:
        bundle: what to run.
        graph: its dense graph.

    Attributes:
        plan: an empty one: there is one engine, and so nothing to choose.
        specialises, own_engines: no engine can be made for what images keep.
    """

    plan = EnginePlan([])
    specialises = False
    own_engines = 0

    def __init__(self, bundle: Bundle, graph: DenseGraph) -> None:
        self._arch, self._path = bundle.architecture, bundle.path
        self._graph = graph
        graph.load()

    def run(
        self, images: Float, offsets: Offsets, replay: Policy | None = None, observe: Observer | None = None
    ) -> tuple[Float, Policy]:
        """Runs images; see `Dispatcher.run`. The policy keeps everything.

        The observer is told of one engine, "dense", with each image's logits [C].

        Raises:
            InputError: there are offsets: no decision could follow them.
        """
        if any(map(any, offsets.by_block(self._arch.depth))):
            raise no_policies(self._path, "add offsets to")
        logits = np.empty((len(images), self._arch.classes), np.float32)
        for start in range(0, len(images), SIDE_BY_SIDE):
            some = slice(start, start + SIDE_BY_SIDE)
            logits[some] = self._graph.run(images[some])
            check_logits(logits[some], "the logits", start)
        if observe:
            for position, row in enumerate(logits):
                observe(position, "dense", row)
        return logits, Policy.dense(self._arch, len(images)) if replay is None else replay

    def specialise_for(self, policy: Policy) -> int:
        """See `Dispatcher.specialise_for`: nothing to make."""
        return 0
