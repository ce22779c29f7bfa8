"""A compiled model with the weights of one engine, and its inference requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from adavit.bundle.bundle import EngineSpec
from adavit.errors import BackendError, one_line
from adavit.runtime.backends.openvino_buffers import as_rows
from adavit.runtime.backends.openvino_models import mask_of
from adavit.runtime.forks import keep_in_fork
from adavit.runtime.worker import WORKER

__all__ = ["Compiled", "OpenVinoEngine", "Requests"]


class OpenVinoEngine:
    """A compiled model, which other engines may share, with the weights of one of them.

    Args:
        spec: what it takes and fills.
        compiled: the model.
        weights: the model's last inputs, where it takes any.
        masks: whether a mask of the rows comes before these.
    """

    def __init__(
        self, spec: EngineSpec, compiled: Any, weights: Sequence[npt.NDArray[Any]] = (), masks: bool = False
    ) -> None:
        self.spec = spec
        self._weights = [as_rows(array) for array in weights]
        self._masks = masks
        self._rounds = [tensor.shape[0] == "K" for tensor in (*spec.inputs, *spec.outputs)]
        self._requests = Requests(spec.name, compiled)

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """See `Engine.run`. Requests read and write the memory that is there: nothing is copied."""
        rows = [as_rows(value) for value in (*inputs, *outputs)]
        tensors = [r.rounded if rounds else r.tensor for r, rounds in zip(rows, self._rounds, strict=True)]
        further = [weights.tensor for weights in self._weights]
        if self._masks:
            normed = rows[1]
            normed.array[normed.number :] = 0  # what is masked has to be finite
            further.insert(0, mask_of(normed.number, len(normed.array)))
        tensors[len(inputs) : len(inputs)] = further
        self._requests.run(tensors)


class Compiled:
    """A model, compiled once for every worker. Compiled once with as many streams, it takes a sixth longer.

    Args:
        copies: what was compiled.

    Attributes:
        copies: as given; inputs, outputs: the model's ports.
    """

    def __init__(self, copies: Sequence[Any]) -> None:
        self.copies = copies
        self.inputs, self.outputs = copies[0].inputs, copies[0].outputs
        self._requests: dict[str, Requests] = {}
        keep_in_fork(self)

    def requests_of(self, name: str) -> Requests:
        """The requests of an engine, by its name, which last as long as the model."""
        found = self._requests.get(name)
        if found is None:
            found = self._requests.setdefault(name, Requests(name, self))
        return found


class Requests:
    """Inference requests of a compiled model, one for every thread that runs it at once, of the thread's own copy.

    Args:
        name: of the engine.
        compiled: the model.
    """

    def __init__(self, name: str, compiled: Compiled) -> None:
        self._name, self._copies = name, compiled.copies
        self._idle: list[list[Request]] = [[] for _ in self._copies]

    def run(self, tensors: list[Any]) -> None:
        """Runs on the inputs, then the outputs.

        Raises:
            BackendError: OpenVINO failed.
        """
        copy = WORKER.number % len(self._copies)
        try:
            request = self._idle[copy].pop()
        except IndexError:
            request = Request(self._copies[copy])
        try:
            request.run(tensors)
        except RuntimeError as error:
            raise BackendError(f"engine {self._name} failed: {one_line(error)}") from error
        self._idle[copy].append(request)


class Request:
    """An inference request, in which only what differs from its last run is set anew."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = len(compiled.inputs)
        self._set: list[Any] = [None] * (self._inputs + len(compiled.outputs))

    def run(self, tensors: list[Any]) -> None:
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
