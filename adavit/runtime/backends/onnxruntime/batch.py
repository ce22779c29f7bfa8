"""Graphs of batches in ONNX Runtime on the CPU: what they compute on a device, computed where there is none.

They are slower here than one image after the other, so that `load` does not offer them. Tests run every number that a
device would make.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import BOTH, BlockKey
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError, one_line
from adavit.runtime.backend import Options
from adavit.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from adavit.runtime.batch import Bool, Finished, Float, Room

__all__ = ["OnnxRuntimeBatchBackend"]


class OnnxRuntimeBatchBackend(OnnxRuntimeBackend):
    """As `OnnxRuntimeBackend`, with lanes for batches.

    Args:
        graphs: what to run.
        options: as of `OnnxRuntimeBackend`.
    """

    most_images = 32

    def __init__(self, graphs: Graphs, options: Options) -> None:
        super().__init__(graphs, options)
        self.sessions = [self._batch_session(graphs.batch_stem(), {})]
        every = tuple(range(graphs.architecture.heads))
        for block in range(graphs.architecture.depth):
            weights = dict(graphs.quantised_head_weights(BlockKey(block, BOTH, every)))
            weights["heads"] = np.array(every, np.int64)
            self.sessions.append(self._batch_session(graphs.batch_block(block), weights))

    def _batch_session(self, graph: OnnxGraph, weights: Mapping[str, Any]) -> Any:
        return self._session(graph, graph.arrays(self.graphs.tensors) | dict(weights), self._options.threads)

    def acquire(self, batch: int) -> CpuLane:
        """See `BatchBackend.acquire`."""
        return CpuLane(self.ort, self.graphs.architecture, self.sessions, batch)

    def release(self, lane: CpuLane) -> None:
        """See `BatchBackend.release`."""


class CpuLane:
    """See `Lane`: arrays that sessions are bound to.

    Args:
        ort: the bindings.
        arch: the model's shapes.
        sessions: of the stem and the blocks.
        batch: images.
    """

    def __init__(self, ort: ModuleType, arch: Architecture, sessions: list[Any], batch: int) -> None:
        self._handle, self._sessions, self._arch = ort.OrtValue.ortvalue_from_numpy, sessions, arch
        rows, width = batch * arch.tokens + 1, arch.tokens + arch.heads + 2
        self._numbers = np.arange(rows)
        self._rows = [np.empty((rows, arch.width), np.float32) for _ in range(2)]
        self._kept = np.empty((arch.depth, batch, width), bool)
        self._unused = np.empty((batch, width), bool)
        self._state = np.empty((arch.depth + 2, batch), np.int64)
        self._sizes = np.empty((arch.depth, 4), np.int64)
        self._decisions: dict[int, Float] = {}
        self._y = self._rows[0]
        self._logits = np.empty((batch, arch.classes), np.float32)
        self._follows = False

    def start(self, images: Float, limits: Float, kept: Bool | None) -> None:
        """See `Lane.start`."""
        self._limits, self._follows, self._decisions = limits, kept is not None, {}
        if kept is not None:
            self._kept[:] = kept
        self._run(0, {"images": images}, self._rows[0])

    def room(self, block: int) -> Room:
        """See `Lane.room`."""
        return Room.of(self._sizes[block])

    def block(self, block: int, room: Room) -> None:
        """See `Lane.block`."""
        given = {
            "x": self._rows[block % 2],
            "kept": self._kept[block],
            "state": self._state[block],
            "numbers": self._numbers,
            **{name: self._numbers[:size] for name, size in room._asdict().items()},
        }
        self._run(block + 1, given, self._rows[(block + 1) % 2])

    def _run(self, coming: int, given: dict[str, npt.NDArray[Any]], y: Float) -> None:
        """Runs the stem or a block, behind which a block is to come."""
        session, last = self._sessions[coming], coming == self._arch.depth
        self._y = y
        made: dict[str, npt.NDArray[Any]] = {"y": y, "next_state": self._state[coming], "logits": self._logits}
        if not last:
            given["limits"] = np.ascontiguousarray(self._limits[coming])
            made["next_kept"] = self._unused if self._follows else self._kept[coming]
            made["next_sizes"] = self._sizes[coming]
        binding = session.io_binding()
        for value in session.get_inputs():
            binding.bind_ortvalue_input(value.name, self._handle(given[value.name]))
        for value in session.get_outputs():
            if value.name == "next_decisions":
                made[value.name] = np.empty((len(self._logits), value.shape[1]), np.float32)
                self._decisions[coming] = made[value.name]
            binding.bind_ortvalue_output(value.name, self._handle(made[value.name]))
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"a graph failed: {one_line(error)}") from error

    def decisions(self, block: int) -> Float:
        """See `Lane.decisions`."""
        return self._decisions.get(block, np.empty((len(self._logits), 0), np.float32))

    def tokens(self) -> Float:
        """See `Lane.tokens`."""
        return self._y[:-1].reshape(-1, self._arch.tokens, self._arch.width)

    def finish(self) -> Finished:
        """See `Lane.finish`."""
        return Finished(self._logits, self._kept, self._state[self._arch.depth])
