"""A lane on a device: a stream, memory at fixed places, and what runs a batch there.

Everything of a batch is enqueued on the lane's stream, so that what is enqueued later sees what was computed before.
Nothing else uses its memory, so that no lock is held while it waits.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

from adavit.bundle.graph_keys import DENSE_GRAPH, PARTS, STEM_GRAPH, GraphKey
from adavit.runtime.backends.cuda.capture import Executable
from adavit.runtime.backends.cuda.captures import When
from adavit.runtime.backends.cuda.memory import LaneMemory
from adavit.runtime.backends.cuda.runners import Runners
from adavit.runtime.batch import CONDITIONAL, Bool, Finished, Float, Room, Rooms

if TYPE_CHECKING:
    from adavit.runtime.backends.cuda.backend import DeviceBackend

__all__ = ["DeviceLane"]

PLANS = 8
"""CUDA graphs that a lane keeps."""
SEEN = 256
"""Kinds of batches that it remembers."""
Parts = tuple[str | None, ...]
"""Of blocks; None is a whole block."""
PlanKey = tuple[int, str, Rooms]
"""Images, way, and the rooms of the blocks."""


class Plan:
    """What runs batches of one kind at once.

    Attributes:
        runners: its own.
        graph: its CUDA graph, if there is one.
    """

    def __init__(self, runners: Runners) -> None:
        self.runners = runners
        self.graph: Executable | None = None

    def close(self) -> None:
        """Frees it; nothing may be running."""
        if self.graph is not None:
            self.graph.close()
            self.graph = None
        self.runners.close()


class DeviceLane:
    """See `Lane`.

    Args:
        backend: has the engines.
        most: images.
    """

    def __init__(self, backend: DeviceBackend, most: int) -> None:
        self.most = most
        self._backend, self._arch, self._cuda = backend, backend.graphs.architecture, backend.cuda
        self._stream, self._owns_stream = backend.stream()
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._seen: set[PlanKey] = set()
        with ExitStack() as undo:
            undo.callback(self._free_stream)
            self._memory = LaneMemory(self._cuda, self._arch, most, self._stream)
            undo.callback(self._memory.close)
            self._runners = Runners(backend, self._memory, self._memory.scratch(backend.scratch(most)))
            undo.pop_all()
        self._opened: set[tuple[Parts, bool]] = set()
        self._follows = self._every_head = self._fetches = False
        self._last = 0

    def close(self) -> None:
        """Waits for what was enqueued, and frees everything."""
        self._drop_runners()
        self._memory.close()
        self._free_stream()

    # A batch, block by block.

    def start(self, images: Float, limits: Float, kept: Bool | None, every_head: bool) -> None:
        """See `Lane.start`."""
        self._open((None,), every_head)
        self._take(images, limits, kept, every_head)
        self._memory.upload("kept" if self._follows else "limits")
        self._run(self._runners, STEM_GRAPH)

    def room(self, block: int) -> Room:
        """See `Lane.room`."""
        self._memory.fetch_one("sizes", block)
        return Room.of(self._memory.sizes[block]).within(self._memory.layout.batch, self._arch.tokens)

    def block(self, block: int, room: Room) -> None:
        """See `Lane.block`."""
        self._run(self._runners, GraphKey("block", block), room)
        self._last = (block + 1) % 2

    def decisions(self, block: int) -> Float:
        """See `Lane.decisions`."""
        return self._memory.fetched("decisions", 0, (self._memory.layout.batch, self._backend.graphs.decisions(block)))

    def tokens(self) -> Float:
        """See `Lane.tokens`."""
        shape = self._memory.layout.batch, self._arch.tokens, self._arch.width
        return self._memory.fetched("rows", self._last, shape)

    def finish(self) -> Finished:
        """See `Lane.finish`."""
        if not self._fetches:
            self._memory.fetch("kept", "logits")
        self._memory.wait()
        self._backend.add_times(*self._memory.times())
        return self._results()

    def _results(self) -> Finished:
        """Copies what the host has of a batch that is done."""
        memory = self._memory
        return Finished(memory.logits[0].copy(), memory.kept.copy(), memory.state[self._arch.depth].copy())

    # A batch at once.

    def launch(self, images: Float, limits: Float, rooms: Rooms, way: str) -> None:
        """See `Lane.launch`.

        A batch that comes again, in size and rooms, gets a plan. That runs once as it is, so that its engines have met
        the shapes when they are recorded.
        """
        self._open(PARTS if way == CONDITIONAL else (None,), False)
        self._take(images, limits, None, False)
        key = len(images), way, rooms
        plan = self._plans.get(key)
        if plan is None:
            runners = self._new_plan(key).runners if key in self._seen else self._runners
            self._remember(key)
            self._enqueue(runners, rooms, way, None)
        else:
            self._plans.move_to_end(key)
            if plan.graph is None:
                plan.graph = self._record(plan.runners, rooms, way)
            if plan.graph is None:
                self._enqueue(plan.runners, rooms, way, None)
            else:
                plan.graph.launch(self._stream)
        self._fetches = True

    def _remember(self, key: PlanKey) -> None:
        """Notes that a batch came."""
        if len(self._seen) >= SEEN:
            self._seen.clear()
        self._seen.add(key)

    def _new_plan(self, key: PlanKey) -> Plan:
        """Makes a plan, in the place of that which was used least lately."""
        if len(self._plans) >= PLANS:
            self._cuda.call("cudaStreamSynchronize", self._stream)
            self._plans.popitem(last=False)[1].close()
        memory = self._memory
        plan = self._plans[key] = Plan(Runners(self._backend, memory, memory.scratch(0)))
        return plan

    def _record(self, runners: Runners, rooms: Rooms, way: str) -> Executable | None:
        """The CUDA graph of a batch that has run before; None where there can be none."""
        captures = self._backend.captures
        if captures.without_graph(way) is None and not runners.captures():
            captures.refuse(way, "an engine says so")
        return captures.record(way, self._stream, lambda when: self._enqueue(runners, rooms, way, when))

    def _enqueue(self, runners: Runners, rooms: Rooms, way: str, when: When | None) -> None:
        """Enqueues a whole batch: its upload, all engines, and its fetch.

        Args:
            runners: of the engines.
            rooms: of the blocks.
            way: how.
            when: makes conditions; without, everything runs.
        """
        self._memory.upload("limits")
        self._run(runners, STEM_GRAPH)
        for block, room in enumerate(rooms):
            if way == CONDITIONAL:
                self._parts(runners, block, room, when)
            else:
                self._run(runners, GraphKey("block", block), room)
        self._memory.fetch("kept", "logits")

    def _parts(self, runners: Runners, block: int, room: Room, when: When | None) -> None:
        """Runs a block's parts; attention and MLP put tokens and states back in place."""
        memory = self._memory
        conditions = when(memory.at("sizes", block)) if when else [nullcontext(self._stream)] * 2
        for part, condition in zip(PARTS, conditions, strict=False):
            with condition as stream:
                self._run(runners, GraphKey("block", block, part), room, stream)
                memory.move("rows", 1, ("rows", 0), stream)
                memory.move("spare_state", 0, ("state", block), stream)
        self._run(runners, GraphKey("block", block, PARTS[2]))

    # The dense twin, and what all share.

    def dense(self, images: Float) -> Float:
        """The logits that the dense twin makes of images."""
        self._open((), False)
        self._take(images, None, None, False)
        self._memory.upload("images")
        self._run(self._runners, DENSE_GRAPH)
        self._memory.fetch_one("logits", 0)
        self._backend.add_times(*self._memory.times())
        found: Float = self._memory.logits[0].copy()
        return found

    def _take(self, images: Float, limits: Float | None, kept: Bool | None, every_head: bool) -> None:
        """Puts a batch into the host's memory for it."""
        memory = self._memory
        if len(images) != memory.layout.batch:
            memory.arrange(len(images))
        self._follows, self._every_head, self._fetches, self._last = kept is not None, every_head, False, 0
        memory.begin()
        memory.images[0] = images
        if limits is not None:
            memory.limits[:] = limits
        if kept is not None:
            memory.kept[:] = kept
        memory.begin_on_device()

    def _run(self, runners: Runners, key: GraphKey, room: Room | None = None, stream: int | None = None) -> None:
        runners.run(key, self._every_head, self._follows, room, self._stream if stream is None else stream)

    def _open(self, parts: Parts, every_head: bool) -> None:
        """Opens engines, of these parts of all blocks or else the dense twin's, and the scratch memory they take."""
        if (parts, every_head) in self._opened:
            return
        blocks = [GraphKey("block", block, part) for block in range(self._arch.depth) for part in parts]
        for key in blocks or [DENSE_GRAPH]:
            self._backend.engine(key, every_head)
        size = self._backend.scratch(self.most)
        if self._memory.lacks(size):
            self._drop_runners()
            self._runners = Runners(self._backend, self._memory, self._memory.scratch(size))
        self._opened.add((parts, every_head))

    def _drop_runners(self) -> None:
        """Waits for what was enqueued, and frees what runs engines on this lane."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        for plan in self._plans.values():
            plan.close()
        self._plans.clear()
        self._runners.close()

    def _free_stream(self) -> None:
        if self._owns_stream:
            self._cuda.call("cudaStreamDestroy", self._stream)
            self._owns_stream = False
