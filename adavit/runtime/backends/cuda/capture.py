"""CUDA graphs, recorded from what is enqueued on a stream; parts of them run only where a condition holds.

cuda.core's GraphBuilder is not used: it is one more package and records bodies on streams of its own, while
cuda.bindings, which backends need anyway, has the few functions that it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple

from adavit.errors import BackendError
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.setter import Setter

__all__ = ["Condition", "Executable", "Recording"]


class Condition(NamedTuple):
    """Decides at each launch whether a part of a graph runs; it does not unless `Recording.set` says so.

    Attributes:
        handle: CUDA's.
    """

    handle: Any


class Executable:
    """A CUDA graph, ready to be launched; what it reads and writes has to stay allocated.

    Args:
        cuda: the bindings.
        graph: CUDA's executable graph.
    """

    def __init__(self, cuda: Cuda, graph: Any) -> None:
        self._cuda, self._graph = cuda, graph

    def launch(self, stream: Any) -> None:
        """Enqueues the graph."""
        self._cuda.call("cudaGraphLaunch", self._graph, stream)

    def close(self) -> None:
        """Frees it; it may not be running."""
        self._cuda.call("cudaGraphExecDestroy", self._graph)


class Recording:
    """A context manager: what is enqueued on a stream inside becomes a graph and is not run.

    Inside, this thread may not allocate, free or wait. Where the recording fails, the graph is freed and the stream can
    be used again.

    Args:
        cuda: the bindings.
        stream: what to record.
        setter: sets conditions; without one there are none.

    Raises:
        BackendError: inside, a function of CUDA failed; at the end, something did that invalidates the recording.
    """

    def __init__(self, cuda: Cuda, stream: Any, setter: Setter | None = None) -> None:
        self._cuda, self._stream, self._setter = cuda, stream, setter
        self._mode = cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._bodies: Any = None
        self._graph: Any = None

    def __enter__(self) -> Recording:
        if self._setter is not None:  # also makes the device's context current in this thread, which its launch needs
            self._bodies = self._cuda.call("cudaStreamCreateWithFlags", self._cuda.runtime.cudaStreamNonBlocking)
        try:
            self._cuda.call("cudaStreamBeginCapture", self._stream, self._mode)
        except BackendError:
            self._free_bodies()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            graph = self._cuda.call("cudaStreamEndCapture", self._stream)
        except BackendError:
            if error is None:
                raise
            return
        finally:
            self._free_bodies()
        if error is None:
            self._graph = graph
        else:
            self._cuda.call("cudaGraphDestroy", graph)

    def condition(self) -> Condition:
        """A new condition, for one call of `when`."""
        flag = self._cuda.runtime.cudaGraphConditionalHandleFlags.cudaGraphCondAssignDefault
        graph = self._captured(self._stream)[0]
        return Condition(self._cuda.call("cudaGraphConditionalHandleCreate", graph, 0, flag))

    def set(self, sizes: Sequence[tuple[Condition, int]]) -> None:
        """Records setting conditions: each holds where its number is above 0 then.

        Args:
            sizes: conditions, each with the device's address of an int64.
        """
        if self._setter is None:
            raise BackendError("a recording without a setter has no conditions")
        self._setter.launch(self._stream, [(condition.handle, address) for condition, address in sizes])

    @contextmanager
    def when(self, condition: Condition) -> Iterator[Any]:
        """Records what is enqueued on the stream that it gives, to run only where a condition holds.

        Raises:
            BackendError: nothing was enqueued, or a function of CUDA failed.
        """
        body = self._add_if(condition)
        self._cuda.call("cudaStreamBeginCaptureToGraph", self._bodies, body, None, None, 0, self._mode)
        try:
            yield self._bodies
            recorded = self._captured(self._bodies)[3]
        except BaseException:
            with suppress(BackendError):
                self._cuda.call("cudaStreamEndCapture", self._bodies)
            raise
        self._cuda.call("cudaStreamEndCapture", self._bodies)
        if not recorded:  # CUDA before 12.8 never ends such a graph
            raise BackendError("nothing was enqueued for a condition of a CUDA graph")

    def instantiate(self) -> Executable:
        """The recorded graph, to be launched; once only."""
        graph, self._graph = self._graph, None
        try:
            return Executable(self._cuda, self._cuda.call("cudaGraphInstantiate", graph, 0))
        finally:
            self._cuda.call("cudaGraphDestroy", graph)

    def _add_if(self, condition: Condition) -> Any:
        """Adds a conditional node after what was recorded so far, and before what comes; its body."""
        runtime = self._cuda.runtime
        graph, *after = self._captured(self._stream)
        node = runtime.cudaGraphNodeParams()
        node.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
        node.conditional.handle = condition.handle
        node.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        node.conditional.size = 1
        added = self._cuda.call("cudaGraphAddNode", graph, *after, node)
        (body,) = node.conditional.phGraph_out
        flag = runtime.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
        self._cuda.call("cudaStreamUpdateCaptureDependencies", self._stream, [added], None, 1, flag)
        return body

    def _captured(self, stream: Any) -> tuple[Any, Any, Any, int]:
        """The graph that a stream is recorded into, the nodes that its next one follows, their edges, and how many."""
        _, _, graph, nodes, edges, count = self._cuda.call("cudaStreamGetCaptureInfo", stream)
        return graph, nodes, edges, count

    def _free_bodies(self) -> None:
        if self._bodies is not None:
            self._cuda.call("cudaStreamDestroy", self._bodies)
            self._bodies = None
