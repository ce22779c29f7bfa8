"""Compiled models, and the requests that run them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from adavit.errors import BackendError, one_line
from adavit.runtime.backends.openvino.models import names_of
from adavit.runtime.forks import keep_in_fork, renew_in_fork
from adavit.runtime.worker import WORKER

__all__ = ["Compiled"]


class Compiled:
    """A model, compiled once for every worker. Compiled once with as many streams, it takes a sixth longer.

    Args:
        name: of the graph.
        workers: that may run it at once.
        compile_model: compiles it.

    Attributes:
        names: of its inputs, then its outputs.
    """

    def __init__(self, name: str, workers: int, compile_model: Callable[[], Any]) -> None:
        self._name, self._workers, self._compile = name, workers, compile_model
        self._copies: dict[int, Any] = {}
        self._idle: dict[tuple[int, int], list[Request]] = {}
        self.after_fork()
        renew_in_fork(self)
        first = self._copy(WORKER.number % workers)
        self.names = [*names_of(first.inputs), *names_of(first.outputs)]

    def after_fork(self) -> None:
        """Makes the locks, in a forked child anew."""
        self._locks = [threading.Lock() for _ in range(self._workers)]

    def compile_all(self) -> None:
        """Compiles it for every worker, so that none of them waits for it."""
        for worker in range(self._workers):
            self._copy(worker)

    def run(self, block: int, tensors: Sequence[Any]) -> None:
        """Runs on the inputs, then the outputs; requests are kept by block, so that its weights stay set.

        Raises:
            BackendError: OpenVINO failed.
        """
        worker = WORKER.number % self._workers
        idle = self._idle.setdefault((worker, block), [])
        try:
            request = idle.pop()
        except IndexError:
            request = Request(self._copy(worker))
        try:
            request.run(tensors)
        except RuntimeError as error:
            raise BackendError(f"graph {self._name} failed: {one_line(error)}") from error
        idle.append(request)

    def _copy(self, worker: int) -> Any:
        """The model of a worker's own."""
        with self._locks[worker]:
            found = self._copies.get(worker)
            if found is None:
                found = self._copies[worker] = self._compile()
                keep_in_fork(found)
        return found


class Request:
    """An inference request, in which only what differs from its last run is set anew."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = len(compiled.inputs)
        self._set: Sequence[Any] = [None] * (self._inputs + len(compiled.outputs))

    def run(self, tensors: Sequence[Any]) -> None:
        """Runs on the inputs, then the outputs."""
        for position, (tensor, before) in enumerate(zip(tensors, self._set, strict=True)):
            if tensor is before:
                continue
            if position < self._inputs:
                self._request.set_input_tensor(position, tensor)
            else:
                self._request.set_output_tensor(position - self._inputs, tensor)
        self._set = tensors
        self._request.infer(share_outputs=True)
