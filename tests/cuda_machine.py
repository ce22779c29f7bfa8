"""A GPU that is not there: memory at real addresses, streams whose work is put off, and CUDA graphs with their rules.

What is enqueued runs when somebody waits for it, and no more of it than that: streams that nothing orders run apart, so
that what is read too early gives wrong numbers. Nodes of graphs run in the order that is least like the one in which
they were recorded, as far as their dependencies allow. Rules of CUDA that are broken fail as in CUDA, or as assertions
where CUDA would do anything at all.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

from cuda_graphs import Condition, Executable, Graph, Node, Work, with_ancestors


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorCallRequiresNewerDriver = 36
    cudaErrorNoDevice = 100
    cudaErrorIllegalState = 401
    cudaErrorNotReady = 600
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureMerge = 902
    cudaErrorStreamCaptureUnmatched = 903
    cudaErrorStreamCaptureUnjoined = 904
    cudaErrorStreamCaptureIsolation = 905
    cudaErrorCapturedEvent = 907
    cudaErrorStreamCaptureWrongThread = 908


class Refused(Exception):
    """A function of CUDA fails with this status."""

    def __init__(self, status: IntEnum) -> None:
        super().__init__(status)
        self.status = status


class Capture:
    """A recording on its way into a graph."""

    def __init__(self, graph: Graph, origin: Stream, owned: bool) -> None:
        self.graph, self.origin, self.owned = graph, origin, owned
        self.thread, self.streams, self.valid = threading.get_ident(), [origin], True


class Stream:
    """What bindings give for a stream: no int, but it can be made one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue: deque[Work] = deque()
        self.capture: Capture | None = None
        self.last: list[Node] = []

    def __int__(self) -> int:
        return self.number


class Moment:
    """A point in a stream's work."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.done = stream, False


class Event:
    def __init__(self) -> None:
        self.moment: Moment | None = None
        self.captured: tuple[Capture, list[Node]] | None = None

    @property
    def done(self) -> bool:
        return self.moment is None or self.moment.done


class Gpu:
    """The device, and the record of what happened.

    Args:
        driver: its version, 12040 is 12.4.
        bindings: the major version of cuda-bindings.

    Attributes:
        calls: what was called, with a detail.
        memory: each allocation's kind, buffer and size, by address. No address is used twice.
        alive: how many of each kind there are.
        refuse: what fails.
    """

    def __init__(self, driver: int = 13000, bindings: int = 13) -> None:
        self.driver, self.bindings = driver, bindings
        self.calls: list[tuple[str, Any]] = []
        self.memory: dict[int, tuple[str, Any, int]] = {}
        self.streams: dict[int, Stream] = {}
        self.captures: list[Capture] = []
        self.conditions: dict[int, Condition] = {}
        kinds = ("stream", "event", "graph", "exec", "module", "context", "engine")
        self.alive = dict.fromkeys(kinds, 0)
        self.refuse: set[str] = set()
        self.working = threading.RLock()
        self._freed: list[Any] = []
        self._numbers = 4

    def note(self, call: str, detail: Any = None) -> None:
        self.calls.append((call, detail))

    def names(self, *kinds: str) -> list[str]:
        return [name for name, _ in self.calls if not kinds or name in kinds]

    # Memory

    def allocate(self, kind: str, size: int) -> int:
        self.not_while_recording()
        if "memory" in self.refuse:
            raise Refused(Status.cudaErrorMemoryAllocation)
        raw = (ctypes.c_ubyte * (size + 256))(*b"")
        ctypes.memset(raw, 0xFF, size + 256)  # not a number
        address = -(-ctypes.addressof(raw) // 256) * 256
        self.memory[address] = kind, raw, size
        return address

    def free(self, kind: str, address: int) -> None:
        self.not_while_recording()
        assert self.memory[address][0] == kind, f"{kind} memory freed as another kind, or twice"
        self.work()  # as CUDA does
        self._freed.append(self.memory.pop(address))

    def check(self, address: int, size: int, kind: str) -> None:
        """That these bytes are within one allocation of a kind."""
        assert any(
            start <= address and address + size <= start + length and kind == found
            for start, (found, _, length) in list(self.memory.items())
        ), f"{size} bytes at {address:#x} are no {kind} memory"

    # Streams and events

    def new_number(self) -> int:
        with self.working:
            self._numbers += 1
            return self._numbers

    def new_stream(self) -> Stream:
        stream = Stream(self.new_number())
        self.streams[stream.number] = stream
        self.alive["stream"] += 1
        return stream

    def stream(self, handle: Any) -> Stream:
        """The stream of a handle or a number."""
        assert int(handle) in self.streams, f"{handle} is no stream"
        return self.streams[int(handle)]

    def destroy_stream(self, handle: Any) -> None:
        stream = self.stream(handle)
        assert not stream.queue and stream.capture is None, "a stream goes last"
        assert self.alive["stream"] > 1 or self.alive["event"] == 0, "the stream goes last"
        del self.streams[stream.number]
        self.alive["stream"] -= 1

    def enqueue(self, work: Work, handle: Any) -> None:
        """Puts work off, or records it."""
        stream = self.stream(handle)
        if (capture := self._recording(stream)) is None:
            stream.queue.append(work)
        else:
            node = Node(stream.last, work)
            capture.graph.nodes.append(node)
            stream.last = [node]

    def record(self, event: Event, handle: Any) -> None:
        stream = self.stream(handle)
        if (capture := self._recording(stream)) is not None:
            event.captured = capture, list(stream.last)
            return
        event.captured, event.moment = None, (moment := Moment(stream))
        stream.queue.append(lambda: setattr(moment, "done", True))

    def wait_for(self, handle: Any, event: Event) -> None:
        """Makes a stream wait for an event; an event of a recording takes the stream into it."""
        stream = self.stream(handle)
        current = self._recording(stream)
        if event.captured is None:
            if current is not None:
                self._invalidate([current], Status.cudaErrorStreamCaptureIsolation)
            if (moment := event.moment) is not None:
                stream.queue.append(lambda: self.reach(moment))
            return
        capture, nodes = event.captured
        if capture not in self.captures:
            raise Refused(Status.cudaErrorCapturedEvent)
        if current is None:
            stream.capture, stream.last = capture, []
            capture.streams.append(stream)
        elif current is not capture:
            self._invalidate([current, capture], Status.cudaErrorStreamCaptureMerge)
        stream.last = list(dict.fromkeys([*stream.last, *nodes]))

    def reach(self, moment: Moment) -> None:
        """Does what was put off on a stream until this moment."""
        with self.working:
            while not moment.done:
                moment.stream.queue.popleft()()

    def synchronise(self, handle: Any) -> None:
        """Does all that was put off on a stream."""
        self.not_while_recording()
        stream = self.stream(handle)
        if stream.capture is not None:  # in another thread
            self._invalidate([stream.capture], Status.cudaErrorStreamCaptureUnsupported)
        self._drain(stream)

    def finished(self, event: Event) -> bool:
        """Whether an event has been reached, for a host that asks or waits."""
        self.not_while_recording()
        if event.captured is not None:
            self._invalidate([event.captured[0]], Status.cudaErrorCapturedEvent)
        return event.done

    def work(self) -> None:
        """Does all that was put off."""
        for stream in list(self.streams.values()):
            self._drain(stream)

    def _drain(self, stream: Stream) -> None:
        with self.working:
            while stream.queue:
                stream.queue.popleft()()

    # Graphs

    def begin(self, handle: Any, graph: Graph | None = None, after: Iterable[Node] = ()) -> None:
        """Records a stream into a new graph, or into a body."""
        stream = self.stream(handle)
        if stream.capture is not None:
            raise Refused(Status.cudaErrorIllegalState)
        assert graph is None or graph.root().alive, "a graph that was freed"
        stream.capture = Capture(graph or Graph(), stream, graph is None)
        stream.last = list(after)
        self.captures.append(stream.capture)

    def end(self, handle: Any) -> Graph:
        """Ends a recording; its graph."""
        stream = self.stream(handle)
        capture = stream.capture
        if capture is None or capture.origin is not stream:
            raise Refused(Status.cudaErrorStreamCaptureUnmatched)
        if capture.thread != threading.get_ident():
            self._invalidate([capture], Status.cudaErrorStreamCaptureWrongThread)
        joined = with_ancestors(stream.last)
        forked = [node for other in capture.streams for node in other.last]
        for one in capture.streams:
            one.capture, one.last = None, []
        self.captures.remove(capture)
        if not capture.valid:
            raise Refused(Status.cudaErrorStreamCaptureInvalidated)
        if not joined.issuperset(forked):
            raise Refused(Status.cudaErrorStreamCaptureUnjoined)
        self.alive["graph"] += capture.owned
        return capture.graph

    def recorded_so_far(self, handle: Any) -> Stream:
        """A stream that is recorded, or else IllegalState."""
        stream = self.stream(handle)
        if self._recording(stream) is None:
            raise Refused(Status.cudaErrorIllegalState)
        return stream

    def new_condition(self, graph: Graph, default: int) -> int:
        assert graph.root().alive, "a graph that was freed"
        handle = (self.new_number() << 40) + 7  # more than 32 bits, as CUDA's are
        self.conditions[handle] = Condition(graph, default)
        graph.handles.append(handle)
        return handle

    def add_if(self, graph: Graph, after: list[Node], handle: int) -> tuple[Node, Graph]:
        """Adds a conditional node; also its body."""
        assert graph.root().alive and all(node in graph.nodes for node in after), "nodes of another graph"
        condition = self.conditions.get(handle)
        if condition is None or condition.used or condition.graph.root() is not graph.root():
            raise Refused(Status.cudaErrorInvalidValue)
        condition.used = True
        node = Node(after, body=Graph(graph), handle=handle)
        graph.nodes.append(node)
        return node, node.body

    def instantiate(self, graph: Graph) -> Executable:
        self.not_while_recording()
        assert graph.alive and graph.parent is None
        found = Executable(graph)
        if not all(self.conditions[handle].used for handle in found.handles):
            raise Refused(Status.cudaErrorInvalidValue)
        self.alive["exec"] += 1
        return found

    def destroy_graph(self, graph: Graph) -> None:
        assert graph.alive and graph.parent is None, "a graph freed twice, or a body"
        graph.alive = False
        self.alive["graph"] -= 1

    def launch(self, found: Executable, handle: Any) -> None:
        self.only_without_recording(handle)

        def run() -> None:
            for one in found.handles:
                self.conditions[one].value = self.conditions[one].default
            self._run(found.nodes)
            found.running -= 1

        found.running += 1
        self.stream(handle).queue.append(run)

    def destroy_executable(self, found: Executable) -> None:
        assert not found.running, "a graph may be running"
        self.alive["exec"] -= 1

    def _run(self, nodes: list[tuple[Node, list[Any]]]) -> None:
        for node, body in nodes:
            if node.work is not None:
                node.work()
                continue
            assert body or self.driver >= 12080, "an empty body hangs before CUDA 12.8"
            if self.conditions[node.handle].value:
                self._run(body)

    # Rules of recording

    def not_while_recording(self) -> None:
        """Allocating and waiting fail in a thread that records, and take the recording with them."""
        mine = [capture for capture in self.captures if capture.thread == threading.get_ident()]
        if mine:
            self._invalidate(mine, Status.cudaErrorStreamCaptureUnsupported)

    def only_without_recording(self, handle: Any) -> None:
        """For what fails on a stream that is recorded, and takes the recording with it."""
        if (capture := self._recording(self.stream(handle))) is not None:
            self._invalidate([capture], Status.cudaErrorStreamCaptureUnsupported)

    def _recording(self, stream: Stream) -> Capture | None:
        capture = stream.capture
        if capture is not None:
            assert capture.thread == threading.get_ident(), "another thread's work gets into a graph"
            if not capture.valid:
                raise Refused(Status.cudaErrorStreamCaptureInvalidated)
        return capture

    def _invalidate(self, captures: list[Capture], status: Status) -> None:
        for capture in captures:
            capture.valid = False
        raise Refused(status)
