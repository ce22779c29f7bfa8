"""Graphs of batches in ONNX Runtime on the CPU: what they compute on a device, computed where there is none.

They are slower here than one image after the other, so that `load` does not offer them. Tests run every number that a
device would make.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adavit.bundle.graph_keys import PARTS, STEM_GRAPH, GraphKey, constants_of, read_graph
from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import BETWEEN, STATE_BEHIND, STATE_BETWEEN
from adavit.errors import BackendError, one_line
from adavit.runtime.backend import Options
from adavit.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from adavit.runtime.batch import CONDITIONAL, Bool, Finished, Float, Room, Rooms

__all__ = ["OnnxRuntimeBatchBackend"]

Values = dict[str, npt.NDArray[Any]]


class OnnxRuntimeBatchBackend:
    """See `BatchBackend`.

    Args:
        graphs: what to run.
        options: as of `OnnxRuntimeBackend`.
        usual_heads: for each block, the heads that its engine has; None for all.
        most_images: of a lane.
    """

    name = "onnxruntime"
    on_host: Literal[False] = False

    def __init__(
        self,
        graphs: Graphs,
        options: Options,
        usual_heads: tuple[tuple[int, ...], ...] | None = None,
        most_images: int = 32,
    ) -> None:
        self.graphs, self.usual_heads, self.most_images = graphs, usual_heads, most_images
        self._sessions: dict[tuple[GraphKey, bool], Any] = {}
        self._maker, self._threads = OnnxRuntimeBackend(graphs, options), options.threads

    @contextmanager
    def lane(self, batch: int) -> Iterator[CpuLane]:
        """See `BatchBackend.lane`."""
        yield CpuLane(self, batch)

    def why_not(self, way: str) -> str | None:
        """See `BatchBackend.why_not`."""
        return None

    def dense(self, images: Float) -> Float:
        """See `BatchBackend.dense`."""
        return self._maker.dense(images)

    def timings(self) -> dict[str, float]:
        """See `BatchBackend.timings`: nothing was measured."""
        return {}

    def versions(self) -> dict[str, str]:
        """See `BatchBackend.versions`."""
        return self._maker.versions()

    def run(self, key: GraphKey, every_head: bool, given: Values) -> Values:
        """Runs a graph on what it takes of some values; returns what it makes."""
        session = self._session(key, every_head)
        names = [value.name for value in session.get_outputs()]
        inputs = {value.name: given[value.name] for value in session.get_inputs()}
        try:
            return dict(zip(names, session.run(names, inputs), strict=True))
        except Exception as error:
            raise BackendError(f"graph {key.name} failed: {one_line(error)}") from error

    def _session(self, key: GraphKey, every_head: bool) -> Any:
        found = self._sessions.get((key, every_head))
        if found is None:
            graph = read_graph(self.graphs, key)
            usual = None if every_head or key.block is None else self.usual_heads
            heads = usual[key.block] if usual and key.block is not None else None
            constants = constants_of(self.graphs, key, graph, heads)
            found = self._sessions[key, every_head] = self._maker.session(graph, constants, self._threads)
        return found


class CpuLane:
    """See `Lane`.

    Args:
        backend: runs its graphs.
        batch: images.
    """

    def __init__(self, backend: OnnxRuntimeBatchBackend, batch: int) -> None:
        self._backend, self._arch, self._batch = backend, backend.graphs.architecture, batch
        self._numbers = np.arange(batch * self._arch.tokens + 1)
        self._values: Values = {}
        self._kept: list[Bool] = []
        self._follow: Bool | None = None
        self._every_head = False

    def start(self, images: Float, limits: Float, kept: Bool | None, every_head: bool) -> None:
        """See `Lane.start`."""
        self._limits, self._follow, self._every_head, self._kept = limits, kept, every_head, []
        self._values = {"images": images, "limits": np.ascontiguousarray(limits[0])}
        self._run(STEM_GRAPH)
        self._pass_on(0)

    def room(self, block: int) -> Room:
        """See `Lane.room`."""
        return Room.of(self._values["sizes"]).within(self._batch, self._arch.tokens)

    def block(self, block: int, room: Room) -> None:
        """See `Lane.block`."""
        self._give(block, room)
        self._run(GraphKey("block", block))
        self._pass_on(block + 1)

    def launch(self, images: Float, limits: Float, rooms: Rooms, way: str) -> None:
        """See `Lane.launch`."""
        self.start(images, limits, None, False)
        for block, room in enumerate(rooms):
            if way != CONDITIONAL:
                self.block(block, room)
                continue
            self._give(block, room)
            values, sizes = self._values, self._values["sizes"]
            values[BETWEEN], values[STATE_BETWEEN] = values["x"], values["state"]
            if sizes[1]:
                self._run(GraphKey("block", block, PARTS[0]))
            values["y"], values[STATE_BEHIND] = values[BETWEEN], values[STATE_BETWEEN]
            if sizes[3]:
                self._run(GraphKey("block", block, PARTS[1]))
            self._run(GraphKey("block", block, PARTS[2]))
            self._pass_on(block + 1)

    def decisions(self, block: int) -> Float:
        """See `Lane.decisions`."""
        return self._values.get("next_decisions", np.empty((self._batch, 0), np.float32))

    def tokens(self) -> Float:
        """See `Lane.tokens`."""
        return self._values["x"][:-1].reshape(-1, self._arch.tokens, self._arch.width)

    def finish(self) -> Finished:
        """See `Lane.finish`."""
        return Finished(self._values["logits"], np.stack(self._kept), self._values["state"])

    def _give(self, block: int, room: Room) -> None:
        """Puts what a block takes where graphs find it."""
        self._values |= {name: self._numbers[:size] for name, size in room._asdict().items()}
        if block + 1 < self._arch.depth:
            self._values["limits"] = np.ascontiguousarray(self._limits[block + 1])
        self._values["numbers"] = self._numbers

    def _run(self, key: GraphKey) -> None:
        self._values |= self._backend.run(key, self._every_head and key.block is not None, self._values)

    def _pass_on(self, coming: int) -> None:
        """Makes what was made what the next block takes."""
        values = self._values
        values["x"], values["state"] = values["y"], values["next_state"]
        if coming < self._arch.depth:
            values["kept"] = values["next_kept"] if self._follow is None else np.ascontiguousarray(self._follow[coming])
            values["sizes"] = values["next_sizes"]
            self._kept.append(values["kept"])
