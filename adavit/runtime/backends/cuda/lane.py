"""A lane on a device: a stream, memory at fixed places, and what runs a batch there.

Everything of a batch is enqueued on the lane's stream, so that what is enqueued later sees what was computed before.
Nothing else uses its memory, so that no lock is held while it waits.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from adavit.bundle.graph_keys import DENSE_GRAPH, PARTS, STEM_GRAPH, GraphKey
from adavit.bundle.keys import BETWEEN, STATE_BEHIND, STATE_BETWEEN
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError
from adavit.runtime.backends.cuda.capture import Executable
from adavit.runtime.backends.cuda.captures import When
from adavit.runtime.backends.cuda.layout import Layout, aligned
from adavit.runtime.batch import CONDITIONAL, Bool, Finished, Float, Room, Rooms

if TYPE_CHECKING:
    from adavit.runtime.backends.cuda.backend import DeviceBackend

__all__ = ["DeviceEngine", "DeviceLane", "Runner"]

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


class DeviceLane:
    """See `Lane`.

    Args:
        backend: has the engines.
        most: images.
    """

    def __init__(self, backend: DeviceBackend, most: int) -> None:
        self.most = most
        self._backend, self._arch, self._cuda = backend, backend.graphs.architecture, backend.cuda
        self.stream, self._owns_stream = backend.stream()
        self._on = self.stream
        whole, rows = Layout(self._arch, most), most * self._arch.tokens + 1
        self._numbers = aligned(whole.size)
        self._scratch_size = 0
        self._device = self._host = self._scratch = 0
        self._runners: dict[tuple[GraphKey, bool], Runner] = {}
        self._bound: dict[tuple[GraphKey, bool], tuple[int, bool]] = {}
        self._graphs: dict[tuple[int, str], tuple[Rooms, Executable]] = {}
        self._launched: dict[tuple[int, str], Rooms] = {}
        self._events: list[Any] = []
        try:
            self._device = int(self._cuda.call("cudaMalloc", self._numbers + aligned(8 * rows)))
            size = max(whole.exchanged, 8 * rows)
            self._host = int(self._cuda.call("cudaMallocHost", size))
            self._events = [self._cuda.call("cudaEventCreateWithFlags", 0) for _ in range(2)]
            self._memory = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(self._host))
            np.ndarray((rows,), np.int64, self._memory)[:] = np.arange(rows)
            self._copy(self._device + self._numbers, self._host, 8 * rows, "HostToDevice")
            self._cuda.call("cudaStreamSynchronize", self.stream)
        except BaseException:
            self.close()
            raise
        self._every_head = self._follows = False
        self._busy_since = self._waited = 0.0
        self._shape(most)

    def close(self) -> None:
        """Waits for what was enqueued, and frees everything."""
        self._drop_runners()
        for event in self._events:
            self._cuda.call("cudaEventDestroy", event)
        self._events = []
        for free, address in (("cudaFree", self._device), ("cudaFree", self._scratch), ("cudaFreeHost", self._host)):
            if address:
                self._cuda.call(free, address)
        self._device = self._scratch = self._host = 0
        if self._owns_stream:
            self._cuda.call("cudaStreamDestroy", self.stream)
            self._owns_stream = False

    # A batch, block by block.

    def start(self, images: Float, limits: Float, kept: Bool | None, every_head: bool) -> None:
        """See `Lane.start`."""
        self._take(images, limits, kept, every_head)
        self._upload()
        self._run(STEM_GRAPH)

    def room(self, block: int) -> Room:
        """See `Lane.room`."""
        self._fetch(self._layout.at("sizes", block), self._layout.bytes_of("sizes"))
        return Room.of(self._sizes[block])

    def block(self, block: int, room: Room) -> None:
        """See `Lane.block`."""
        self._run(GraphKey("block", block), room)
        self._last = (block + 1) % 2

    def decisions(self, block: int) -> Float:
        """See `Lane.decisions`."""
        count = self._backend.graphs.decisions(block)
        return self._fetched("decisions", 0, (self._layout.batch, count))

    def tokens(self) -> Float:
        """See `Lane.tokens`."""
        arch = self._arch
        return self._fetched("rows", self._last, (self._layout.batch, arch.tokens, arch.width))

    def finish(self) -> Finished:
        """See `Lane.finish`."""
        if not self._fetches:
            self._fetch_results()
        self._wait()
        self._count()
        return self._results()

    def _results(self) -> Finished:
        """Copies what the host has of a batch that is done."""
        return Finished(self._logits[0].copy(), self._kept.copy(), self._state[self._arch.depth].copy())

    # A batch at once.

    def launch(self, images: Float, limits: Float, rooms: Rooms, way: str) -> None:
        """See `Lane.launch`.

        The first batch of a size runs without a CUDA graph, so that engines have met its shapes when they are captured.
        """
        self._take(images, limits, None, False)
        key = len(images), way
        known, graph = self._graphs.get(key, (None, None))
        if known != rooms and graph is not None:
            self._cuda.call("cudaStreamSynchronize", self.stream)
            self._graphs.pop(key)[1].close()
            graph = None
        if graph is None and self._launched.get(key) == rooms:
            graph = self._record(rooms, way)
            if graph is not None:
                self._graphs[key] = rooms, graph
        self._launched[key] = rooms
        if graph is None:
            self._enqueue(rooms, way, None)
        else:
            graph.launch(self.stream)
        self._fetches = True

    def _record(self, rooms: Rooms, way: str) -> Executable | None:
        """The CUDA graph of a batch that has run before; None where there can be none."""
        captures = self._backend.captures
        if captures.without_graph(way) is None and not all(one.captures() for one in self._runners.values()):
            captures.refuse(way, "an engine says so")
        return captures.record(way, self.stream, lambda when: self._enqueue(rooms, way, when))

    def _enqueue(self, rooms: Rooms, way: str, when: When | None) -> None:
        """Enqueues a whole batch: its upload, all engines, and its fetch.

        Args:
            rooms: of the blocks.
            way: how.
            when: makes conditions; without, everything runs.
        """
        self._upload()
        self._run(STEM_GRAPH)
        for block, room in enumerate(rooms):
            if way == CONDITIONAL:
                self._parts(block, room, when)
            else:
                self.block(block, room)
        self._fetch_results()

    def _parts(self, block: int, room: Room, when: When | None) -> None:
        """Runs a block's parts; attention and MLP put tokens and states back in place."""
        layout = self._layout
        conditions = when(self._device + layout.at("sizes", block)) if when else [nullcontext(self.stream)] * 2
        for part, condition in zip(PARTS, conditions, strict=False):
            with condition as stream:
                self._on = stream
                self._run(GraphKey("block", block, part), room)
                for name, back in (("rows", 1), ("spare_state", 0)):
                    target = layout.at("rows") if name == "rows" else layout.at("state", block)
                    source, size = layout.at(name, back), layout.bytes_of(name)
                    self._copy(self._device + target, self._device + source, size, "DeviceToDevice")
            self._on = self.stream
        self._run(GraphKey("block", block, PARTS[2]))
        self._last = 0

    # Below: memory and engines.

    def dense(self, images: Float) -> Float:
        """The logits that the dense twin makes of images."""
        self._take(images, None, None, False)
        layout = self._layout
        self._copy(self._device, self._host, layout.bytes_of("images"), "HostToDevice")
        self._run(DENSE_GRAPH)
        self._fetch(layout.at("logits"), layout.bytes_of("logits"))
        self._count()
        found: Float = self._logits[0].copy()
        return found

    def _shape(self, batch: int) -> None:
        """Arranges memory for a number of images."""
        self._layout = layout = Layout(self._arch, batch)
        names = ("images", "limits", "kept", "sizes", "state", "logits")
        views = (layout.view(self._memory, name) for name in names)
        self._images, self._limits, self._kept, self._sizes, self._state, self._logits = views

    def _take(self, images: Float, limits: Float | None, kept: Bool | None, every_head: bool) -> None:
        """Puts a batch into the host's memory for it."""
        self._busy_since, self._waited = time.perf_counter(), 0.0
        if len(images) != self._layout.batch:
            self._shape(len(images))
        self._follows, self._every_head, self._fetches, self._last = kept is not None, every_head, False, 0
        self._on = self.stream
        self._images[0] = images
        if limits is not None:
            self._limits[:] = limits
        if kept is not None:
            self._kept[:] = kept
        self._cuda.call("cudaEventRecord", self._events[0], self.stream)

    def _upload(self) -> None:
        """Enqueues the upload of a batch, in one piece."""
        end = self._layout.end("kept" if self._follows else "limits")
        self._copy(self._device, self._host, end, "HostToDevice")

    def _fetch_results(self) -> None:
        """Enqueues the fetch of what is left of a batch, in one piece."""
        first, end = self._layout.at("kept"), self._layout.end("logits")
        self._copy(self._host + first, self._device + first, end - first, "DeviceToHost")
        self._fetches = True

    def _fetch(self, offset: int, size: int) -> None:
        """Fetches bytes to their place on the host, and waits for them."""
        self._copy(self._host + offset, self._device + offset, size, "DeviceToHost")
        self._wait()

    def _fetched(self, name: str, index: int, shape: Shape) -> Float:
        """Fetches an array that has no place on the host."""
        found = np.empty(shape, np.float32)
        if not found.size:
            return found
        pinned = int(self._cuda.call("cudaMallocHost", found.nbytes))
        try:
            self._copy(pinned, self._device + self._layout.at(name, index), found.nbytes, "DeviceToHost")
            self._wait()
            ctypes.memmove(found.ctypes.data, pinned, found.nbytes)
        finally:
            self._cuda.call("cudaFreeHost", pinned)
        return found

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        kinds = self._cuda.runtime.cudaMemcpyKind
        self._cuda.call("cudaMemcpyAsync", target, source, size, getattr(kinds, f"cudaMemcpy{kind}"), self._on)

    def _wait(self) -> None:
        began = time.perf_counter()
        self._cuda.call("cudaEventRecord", self._events[1], self.stream)
        self._cuda.call("cudaEventSynchronize", self._events[1])
        self._waited += time.perf_counter() - began

    def _count(self) -> None:
        """Counts the times of a batch that is done."""
        spent = time.perf_counter() - self._busy_since
        on_device = float(self._cuda.call("cudaEventElapsedTime", *self._events))
        self._backend.add_times(1e3 * (spent - self._waited), on_device, 1e3 * self._waited)

    def _run(self, key: GraphKey, room: Room | None = None) -> None:
        """Enqueues a run of an engine."""
        which = key, self._every_head and key.block is not None
        runner = self._runners.get(which) or self._new_runner(*which)
        if self._bound.get(which) != (how := (self._layout.batch, self._follows)):
            self._bind(*which, runner)
            self._bound[which] = how
        runner.run(room._asdict() if room else {}, self._on)

    def _new_runner(self, key: GraphKey, every_head: bool) -> Runner:
        engine = self._backend.engine(key, every_head)
        if (size := self._backend.scratch(self.most)) > self._scratch_size:
            self._drop_runners()  # they have less memory
            if self._scratch:
                self._cuda.call("cudaFree", self._scratch)
            self._scratch, self._scratch_size = int(self._cuda.call("cudaMalloc", size)), size
        found = engine.runner(self._scratch, self._scratch_size)
        self._runners[key, every_head] = found
        return found

    def _drop_runners(self) -> None:
        """Waits for what was enqueued, and frees what runs engines on this lane."""
        self._cuda.call("cudaStreamSynchronize", self.stream)
        for _, graph in self._graphs.values():
            graph.close()
        for runner in self._runners.values():
            runner.close()
        for known in (self._graphs, self._runners, self._bound, self._launched):
            known.clear()

    def _bind(self, key: GraphKey, every_head: bool, runner: Runner) -> None:
        """Binds an engine to this lane's memory, for as many images as there are now."""
        layout, graph = self._layout, self._backend.engine(key, every_head).graph
        rows = layout.batch * self._arch.tokens
        largest = {"T": rows, "A": layout.batch, "K": self._arch.tokens, "U": rows}
        places, addresses, shapes = self._places(key), {}, {}
        for value in (*graph.inputs, *graph.outputs):
            place = places.get(value.name)
            if place is None:
                raise BackendError(f"graph {key.name} has {value.name!r}, for which there is no memory; export again")
            addresses[value.name] = self._device + place
            shapes[value.name] = layout.shape(value, largest)
        runner.bind(addresses, shapes)

    def _places(self, key: GraphKey) -> dict[str, int]:
        """The offsets of an engine's inputs and outputs, by their names."""
        at, block = self._layout.at, -1 if key.block is None else key.block
        coming = min(block + 1, self._arch.depth - 1)
        found = {"images": at("images"), "limits": at("limits", coming), "logits": at("logits")}
        found |= {"next_kept": at("unused") if self._follows else at("kept", coming), "next_decisions": at("decisions")}
        found |= {"next_state": at("state", block + 1), "next_sizes": at("sizes", coming)}
        found |= dict.fromkeys(("numbers", *Room._fields), self._numbers)
        if key.block is not None:
            found |= {"kept": at("kept", block), "state": at("state", block)}
        rows, spare = (at("rows", 0), at("rows", 1)), at("spare_state")
        if key.part is None:
            return found | {"x": rows[block % 2], "y": rows[(block + 1) % 2]}
        if key.part == "attention":
            return found | {"x": rows[0], BETWEEN: rows[1], STATE_BETWEEN: spare}
        if key.part == "mlp":
            given = {BETWEEN: rows[0], STATE_BETWEEN: at("state", block)}
            return found | given | {"y": rows[1], STATE_BEHIND: spare}
        return found | {"y": rows[0], STATE_BEHIND: at("state", block)}
