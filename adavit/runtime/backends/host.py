"""What backends on the CPU share: graphs that are read once, one model for all blocks of a kind, slots on the host."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from adavit.architecture import Architecture
from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Array, Quantised
from adavit.bundle.keys import BlockKey, Sublayers
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.runtime.backend import Float, Options
from adavit.runtime.forks import renew_in_fork

__all__ = ["Constants", "HostBackend", "HostSlot", "Prepared", "matrix_bytes"]

Model = TypeVar("Model")
Constants = Mapping[str, Array | Quantised]


class Prepared(NamedTuple):
    """A block with the weights of some heads as constants.

    Attributes:
        threads: that run it.
        key: its sub-layers and heads.
    """

    threads: int
    key: BlockKey


def matrix_bytes(arch: Architecture, key: BlockKey) -> int:
    """Of the matrices that a block has as constants."""
    channels = len(key.heads) * arch.head_width
    attention, mlp = 4 * channels * arch.width, arch.hidden * (channels + arch.width)
    return 4 * (key.sublayers.attention * attention + key.sublayers.mlp * mlp)


class HostBackend(ABC, Generic[Model]):
    """What `Backend` says of graphs and of what is prepared; a backend adds how a model is made, and its slots.

    Args:
        graphs: what to run.
        options: how.

    Attributes:
        graphs: as given.
        constant: what is prepared; replaced as a whole.
    """

    on_host: Literal[True] = True

    def __init__(self, graphs: Graphs, options: Options) -> None:
        self.graphs = graphs
        self.constant: Mapping[Prepared, Model] = {}
        self._options = options
        self._made: dict[tuple[bytes, int], Model] = {}
        self._blocks: dict[tuple[int, Sublayers], OnnxGraph] = {}
        self._shared: dict[tuple[int, Sublayers], tuple[OnnxGraph, bytes]] = {}
        self.after_fork()
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Makes the lock, in a forked child anew."""
        self._lock = threading.RLock()

    @abstractmethod
    def _make(self, graph: OnnxGraph, constants: Callable[[], Constants], threads: int) -> Model:
        """A graph with some constants, ready to run on so many threads; other weights are inputs."""

    def _load_blocks(self, threads: int) -> None:
        """Reads every graph, and makes what runs them on so many threads."""
        self.graphs.check_deciding()
        self._stem = self.graphs.stem()
        self.stem(threads)
        for block, files in enumerate(self.graphs.files.blocks):
            for sublayers in files:
                graph = self._blocks[block, sublayers] = self.graphs.block(block, sublayers)
                shared = self._to_share(graph, block)
                self._shared[block, sublayers] = shared, shared.model({})
                self.shared(block, sublayers, threads)

    def stem(self, threads: int) -> Model:
        """What runs the stem."""
        return self._kept(b"stem", self._stem, lambda: self._stem.arrays(self.graphs.tensors), threads)

    def shared(self, block: int, sublayers: Sublayers, threads: int) -> Model:
        """What runs a block with all weights as inputs, which other blocks share."""
        graph, name = self._shared[block, sublayers]
        return self._kept(name, graph, dict, threads)

    def _to_share(self, graph: OnnxGraph, block: int) -> OnnxGraph:
        """A block's graph as it runs with all weights as inputs."""
        return graph

    def _dense(self) -> Model:
        """What runs the dense twin."""
        found = self._made.get((b"dense", self._options.threads))
        if found is None:
            graph = self.graphs.dense()
            found = self._kept(b"dense", graph, lambda: graph.arrays(self.graphs.tensors), self._options.threads)
        return found

    def _kept(self, name: bytes, graph: OnnxGraph, constants: Callable[[], Constants], threads: int) -> Model:
        """A model that is made once."""
        found = self._made.get((name, threads))
        if found is None:
            with self._lock:
                found = self._made.get((name, threads))
                if found is None:
                    found = self._made[name, threads] = self._make(graph, constants, threads)
        return found

    def _add(self, wanted: Prepared, model: Model) -> None:
        """Adds what was prepared."""
        with self._lock:
            self.constant = {**self.constant, wanted: model}

    def retain(self, wanted: Sequence[Prepared]) -> None:
        """See `Backend.retain`."""
        with self._lock:
            self.constant = {prepared: self.constant[prepared] for prepared in wanted if prepared in self.constant}

    def prepared(self) -> Sequence[Prepared]:
        """See `Backend.prepared`."""
        return list(self.constant)

    def timings(self) -> dict[str, float]:
        """See `Backend.timings`: there is nothing to tell."""
        return {}


class HostSlot:
    """An image's tokens, decisions and logits in arrays; see `Slot`.

    Args:
        graphs: that run on it.
        handle: makes the backend's handle of an array, in the memory where it is.
    """

    def __init__(self, graphs: Graphs, handle: Callable[[Array], Any]) -> None:
        arch = graphs.architecture
        self._graphs, self._handle = graphs, handle
        self._tokens = np.empty((arch.tokens, arch.width), np.float32)
        self._logits = np.empty((1, arch.classes), np.float32)
        self._decisions = np.zeros((arch.depth + 1, arch.tokens + arch.heads + 2), np.float32)
        self._kept = np.zeros(arch.tokens, np.int64)
        tokens = handle(self._tokens)
        self._memory = {"x": tokens, "y": tokens, "logits": handle(self._logits)}
        self._counted: dict[int, Any] = {}
        self._coming = 0

    def decisions(self) -> Float:
        """See `Slot.decisions`."""
        found: Float = self._decisions[self._coming]
        return found

    def logits(self) -> Float:
        """See `Slot.logits`."""
        found: Float = self._logits[0]
        return found

    def tokens(self) -> Float:
        """See `Slot.tokens`."""
        return self._tokens

    def _values(self, given: Mapping[str, Any], deciding: int) -> dict[str, Any]:
        """What a graph that decides for a block reads and fills, by name, with what it is given besides."""
        count = self._graphs.decisions(deciding)
        made = self._handle(self._decisions[deciding : deciding + 1, :count]) if count else None
        return {**self._memory, **given, "decisions": made}

    def _indices(self, rows: int) -> Any:
        """The first kept tokens."""
        found = self._counted.get(rows)
        if found is None:
            found = self._counted[rows] = self._handle(self._kept[:rows])
        return found
