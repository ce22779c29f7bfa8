"""What runs engines on a lane's memory: for each engine a runner, bound to where its inputs and outputs are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from adavit.bundle.graph_keys import GraphKey
from adavit.bundle.keys import BETWEEN, STATE_BEHIND, STATE_BETWEEN
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError
from adavit.runtime.backends.cuda.memory import LaneMemory
from adavit.runtime.batch import Room

if TYPE_CHECKING:
    from adavit.runtime.backends.cuda.backend import DeviceBackend

__all__ = ["DeviceEngine", "Runner", "Runners"]

Shape = tuple[int, ...]


class Runner(Protocol):
    """Runs an engine for one lane."""

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
        """Says where all inputs and outputs are, and their shapes; of those that have room, the largest."""
        ...

    def run(self, room: Mapping[str, int], stream: int) -> None:
        """Enqueues a run with so much room, by the inputs' names."""
        ...

    def captures(self) -> bool:
        """Whether a run can become part of a CUDA graph."""
        ...

    def close(self) -> None:
        """Frees it; nothing may be running."""
        ...


class DeviceEngine(Protocol):
    """A graph that was made ready to run on the device.

    Attributes:
        graph: what it computes, without what is constant in the engine.
    """

    graph: OnnxGraph

    @property
    def most_images(self) -> int:
        """Images of a run at most."""
        ...

    def scratch(self, batch: int) -> int:
        """Bytes of memory that a run of so many images takes beside its inputs and outputs."""
        ...

    def runner(self, scratch: int, size: int) -> Runner:
        """What runs it for a lane, with scratch memory of some size at an address."""
        ...

    def close(self) -> None:
        """Frees it; nothing may be running."""
        ...


class Runners:
    """The runners of a lane for blocks one by one, or of one of its CUDA graphs.

    A graph has runners of its own: TensorRT's contexts may not be changed once a graph was made of them.

    Args:
        backend: has the engines.
        memory: where their values are.
        scratch: what they use while they run: address and bytes.
    """

    def __init__(self, backend: DeviceBackend, memory: LaneMemory, scratch: tuple[int, int]) -> None:
        self._backend, self._memory, self._scratch = backend, memory, scratch
        self._depth = backend.graphs.architecture.depth
        self._runners: dict[tuple[GraphKey, bool], Runner] = {}
        self._bound: dict[tuple[GraphKey, bool], tuple[int, bool]] = {}

    def run(self, key: GraphKey, every_head: bool, follows: bool, room: Room | None, stream: int) -> None:
        """Enqueues a run of an engine.

        Args:
            key: its graph.
            every_head: whether it has to have all heads of its block.
            follows: leave the policy that is there alone.
            room: of a block.
            stream: where.
        """
        which, batch = (key, every_head and key.block is not None), self._memory.layout.batch
        runner = self._runners.get(which)
        if runner is None:
            runner = self._runners[which] = self._backend.engine(*which).runner(*self._scratch)
        if self._bound.get(which) != (batch, follows):
            self._bind(*which, follows, runner)
            self._bound[which] = batch, follows
        runner.run(room._asdict() if room else {}, stream)

    def captures(self) -> bool:
        """Whether what ran can be captured."""
        return all(runner.captures() for runner in self._runners.values())

    def close(self) -> None:
        """Frees them; nothing may be running."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
        self._bound.clear()

    def _bind(self, key: GraphKey, every_head: bool, follows: bool, runner: Runner) -> None:
        """Binds an engine to the lane's memory, for as many images as there are now."""
        graph, layout = self._backend.engine(key, every_head).graph, self._memory.layout
        tokens = self._backend.graphs.architecture.tokens
        largest = {"T": layout.batch * tokens, "A": layout.batch, "K": tokens, "U": layout.batch * tokens}
        values, places = (*graph.inputs, *graph.outputs), self._places(key, follows)
        if unknown := [value.name for value in values if value.name not in places]:
            raise BackendError(f"graph {key.name} has {unknown[0]!r}, for which there is no memory; export again")
        addresses = {value.name: places[value.name] for value in values}
        runner.bind(addresses, {value.name: layout.shape(value, largest) for value in values})

    def _places(self, key: GraphKey, follows: bool) -> dict[str, int]:
        """The addresses of an engine's inputs and outputs, by their names."""
        at, block = self._memory.at, -1 if key.block is None else key.block
        coming = min(block + 1, self._depth - 1)
        found = {
            "images": at("images"),
            "limits": at("limits", coming),
            "next_kept": at("unused") if follows else at("kept", coming),
            "next_decisions": at("decisions"),
            "next_state": at("state", block + 1),
            "next_sizes": at("sizes", coming),
            "logits": at("logits"),
            **dict.fromkeys(("numbers", *Room._fields), self._memory.numbers),
        }
        rows, spare = (at("rows", 0), at("rows", 1)), at("spare_state")
        if key.block is None:
            return found | {"y": rows[0]}
        found |= {"kept": at("kept", block), "state": at("state", block)}
        if key.part is None:
            return found | {"x": rows[block % 2], "y": rows[(block + 1) % 2]}
        if key.part == "attention":
            return found | {"x": rows[0], BETWEEN: rows[1], STATE_BETWEEN: spare}
        if key.part == "mlp":
            given = {BETWEEN: rows[0], STATE_BETWEEN: at("state", block)}
            return found | given | {"y": rows[1], STATE_BEHIND: spare}
        return found | {"y": rows[0], STATE_BEHIND: at("state", block)}
