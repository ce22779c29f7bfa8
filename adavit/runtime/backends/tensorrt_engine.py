"""A TensorRT engine, its execution contexts, and its CUDA graphs."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from adavit.errors import BackendError
from adavit.runtime.backends.device import Block, Device
from adavit.runtime.backends.device_moves import Uploads
from adavit.bundle.bundle import EngineSpec

__all__ = ["TensorRtEngine"]

Shape = tuple[int, ...]

HOT = 3
"""Runs of the same shapes at the same addresses after which they become a CUDA graph."""
GRAPHS = 32
"""CUDA graphs of an execution context."""
COUNTED = 4096
"""Different runs of an execution context that are counted."""


class TensorRtEngine:
    """An engine with a context for every thread that runs it.

    Args:
        device: where it runs.
        trt: the bindings.
        engine: TensorRT's engine.
        spec: what the bundle says of it.
        graphs: whether what is run again and again becomes CUDA graphs.
        logged: what TensorRT had to say, in brackets.

    Raises:
        BackendError: the engine has other tensors than the bundle says.
    """

    def __init__(
        self, device: Device, trt: Any, engine: Any, spec: EngineSpec, graphs: bool, logged: Callable[[], str]
    ) -> None:
        self.logged = logged
        self.spec = spec
        self.device = device
        self.graphs = graphs
        self._trt = trt
        self._engine = engine
        self._contexts: dict[int, Context] = {}
        tensors = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        wanted = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        if tensors != set(wanted) or any(
            engine.get_tensor_location(name) != trt.TensorLocation.DEVICE for name in wanted
        ):
            raise BackendError(f"engine {spec.name} has other inputs or outputs than config.json says; build it again")
        self.profiles = [
            {t.name: tuple(map(tuple, engine.get_tensor_profile_shape(t.name, index)[::2])) for t in spec.inputs}
            for index in range(engine.num_optimization_profiles)
        ]
        device.reserve(int(engine.device_memory_size_v2))

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """See `Engine.run`; what it enqueues is done when something that depends on it is fetched."""
        with self.device.lock, self.device.enqueuing():
            self._context().enqueue(inputs, outputs)

    def new_context(self) -> Any:
        """An execution context without device memory of its own; raises BackendError where TensorRT makes none."""
        if self._engine is None:
            raise BackendError(f"engine {self.spec.name} is closed")
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise BackendError(f"TensorRT made no execution context of engine {self.spec.name}{self.logged()}")
        return context

    def close(self) -> None:
        """Frees graphs, contexts and the engine, in this order; nothing may be running."""
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()
        self._engine = None

    def _context(self) -> Context:
        thread = threading.get_ident()
        context = self._contexts.get(thread)
        if context is None:
            alive = {other.ident for other in threading.enumerate()}
            for ended in self._contexts.keys() - alive:
                self.device.synchronise()
                self._contexts.pop(ended).close()
            context = self._contexts[thread] = Context(self)
        return context


class Context:
    """One thread's execution context of an engine."""

    def __init__(self, engine: TensorRtEngine) -> None:
        self._engine = engine
        self._device, self._cuda, self._stream = engine.device, engine.device.cuda, engine.device.stream
        self._context = engine.new_context()
        self._scratch: Block | None = None
        self._profile: int | None = None
        self._shapes: dict[str, Shape] = {}
        self._uploads = Uploads(self._device)
        self._runs: Counter[tuple[Any, ...]] = Counter()
        self._graphs: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def enqueue(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Enqueues a run of the engine, the uploads of host arrays first."""
        spec = self._engine.spec
        tensors = self._uploads.tensors(spec, inputs, outputs)
        shapes = {tensor.name: rows.shape for tensor, rows in tensors[: len(spec.inputs)]}
        addresses = {tensor.name: rows.address for tensor, rows in tensors}
        if not self._engine.graphs:
            self._enqueue(shapes, addresses)
            return
        key = (self._device.scratch.address, *shapes.values(), *addresses.values())
        if (graph := self._graphs.get(key)) is not None:
            self._graphs.move_to_end(key)
            self._cuda.call("cudaGraphLaunch", graph, self._stream)
            return
        self._enqueue(shapes, addresses)
        if len(self._runs) >= COUNTED:
            self._runs.clear()
        self._runs[key] += 1
        if self._runs[key] == HOT:
            self._capture(key)

    def close(self) -> None:
        """Frees the graphs, then the context."""
        for graph in self._graphs.values():
            self._cuda.call("cudaGraphExecDestroy", graph)
        self._graphs.clear()
        self._context = None

    def _enqueue(self, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        scratch = self._device.scratch
        if self._scratch is not scratch:
            self._scratch = scratch
            self._context.set_device_memory(scratch.address, scratch.size)
        self._choose_profile(shapes)
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._check(self._context.set_input_shape(name, shape), f"the shape {list(shape)} of {name}")
                self._shapes[name] = shape
        for name, address in addresses.items():
            self._check(self._context.set_tensor_address(name, address), f"the address of {name}")
        self._check(self._context.execute_async_v3(self._stream), "to run")

    def _choose_profile(self, shapes: dict[str, Shape]) -> None:
        """Switches to the first profile that the shapes are within, unless they are within the one in use."""
        profiles = self._engine.profiles
        candidates = range(len(profiles)) if self._profile is None else (self._profile, *range(len(profiles)))
        for index in candidates:
            if all(_within(shape, *profiles[index][name]) for name, shape in shapes.items()):
                break
        else:
            raise BackendError(self._outside(shapes))
        if index != self._profile:
            self._check(self._context.set_optimization_profile_async(index, self._stream), f"profile {index}")
            self._profile, self._shapes = index, {}

    def _outside(self, shapes: dict[str, Shape]) -> str:
        profiles = self._engine.profiles
        name, shape, most = next(
            (name, shape, max(profile[name][1] for profile in profiles))
            for name, shape in shapes.items()
            if not any(_within(shape, *profile[name]) for profile in profiles)
        )
        return (
            f"engine {self._engine.spec.name}: {name} is {list(shape)}, the engine was built for up to {list(most)}; "
            "run fewer images at once, or build with a larger --max-batch"
        )

    def _capture(self, key: tuple[Any, ...]) -> None:
        """Makes a graph of the run that was just enqueued."""
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            self._check(self._context.execute_async_v3(self._stream), "to run into a CUDA graph")
        finally:
            graph = self._cuda.call("cudaStreamEndCapture", self._stream)
        self._graphs[key] = self._cuda.call("cudaGraphInstantiate", graph, 0)
        self._cuda.call("cudaGraphDestroy", graph)
        del self._runs[key]
        if len(self._graphs) > GRAPHS:
            self._device.synchronise()
            self._cuda.call("cudaGraphExecDestroy", self._graphs.popitem(last=False)[1])

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"engine {self._engine.spec.name}: TensorRT refuses {what}{self._engine.logged()}")


def _within(shape: Shape, least: Shape, most: Shape) -> bool:
    return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
