"""A TensorRT engine, its execution context, and its CUDA graphs."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError
from adavit.runtime.backends.cuda.arrays import DeviceArray, check_arrays
from adavit.runtime.backends.cuda.device import Allocation, Device

__all__ = ["TensorRtEngine"]

Shape = tuple[int, ...]

HOT = 3
"""Runs of the same shapes at the same addresses after which they become a CUDA graph."""
GRAPHS = 32
"""CUDA graphs of an engine."""
COUNTED = 4096
"""Different runs of an engine that are counted."""


class TensorRtEngine:
    """An engine with one execution context: one stream runs one run of it after the other.

    Args:
        device: where it runs.
        trt: the bindings.
        engine: TensorRT's engine.
        name: for messages.
        graph: what it was built from.
        graphs: whether what is run again and again becomes CUDA graphs.
        logged: what TensorRT had to say, in brackets.

    Raises:
        BackendError: the engine has other tensors than the graph.
    """

    def __init__(
        self,
        device: Device,
        trt: Any,
        engine: Any,
        name: str,
        graph: OnnxGraph,
        graphs: bool,
        logged: Callable[[], str],
    ) -> None:
        self.graph = graph
        self._device, self._cuda, self._stream = device, device.cuda, device.stream
        self._trt, self._engine, self._name, self._logged = trt, engine, name, logged
        self._makes_graphs = graphs
        self._inputs, self._outputs = ([v.name for v in values] for values in (graph.inputs, graph.outputs))
        wanted = {*self._inputs, *self._outputs}
        tensors = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if tensors != wanted or any(engine.get_tensor_location(one) != trt.TensorLocation.DEVICE for one in wanted):
            raise BackendError(f"engine {name} has other inputs or outputs than the bundle's graph; build it again")
        self._profiles: list[dict[str, tuple[Shape, Shape]]] = [
            {one: _limits(engine, one, index) for one in self._inputs}
            for index in range(engine.num_optimization_profiles)
        ]
        device.reserve(int(engine.device_memory_size_v2))
        self._context: Any = None
        self._scratch: Allocation | None = None
        self._profile: int | None = None
        self._shapes: dict[str, Shape] = {}
        self._runs: Counter[tuple[Any, ...]] = Counter()
        self._graphs: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    @property
    def most_images(self) -> int:
        """See `DeviceEngine`."""
        return max(profile["images"][1][0] for profile in self._profiles)

    def run(self, arrays: Mapping[str, DeviceArray]) -> None:
        """See `DeviceEngine.run`; what it enqueues is done when something that depends on it is fetched."""
        check_arrays(self._name, (*self.graph.inputs, *self.graph.outputs), arrays)
        shapes = {name: arrays[name].shape for name in self._inputs}
        addresses = {name: arrays[name].address for name in (*self._inputs, *self._outputs)}
        with self._device.lock, self._device.enqueuing():
            self._run(shapes, addresses)

    def close(self) -> None:
        """Frees the graphs, the context and the engine, in this order; nothing may be running."""
        for graph in self._graphs.values():
            self._cuda.call("cudaGraphExecDestroy", graph)
        self._graphs.clear()
        self._context = None
        self._engine = None

    def _run(self, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        if not self._makes_graphs:
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

    def _enqueue(self, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        if self._context is None:
            self._context = self._new_context()
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

    def _new_context(self) -> Any:
        """An execution context without device memory of its own; raises BackendError where TensorRT makes none."""
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise BackendError(f"TensorRT made no execution context of engine {self._name}{self._logged()}")
        return context

    def _choose_profile(self, shapes: dict[str, Shape]) -> None:
        """Switches to the first profile that the shapes are within, unless they are within the one in use."""
        profiles = self._profiles
        candidates = range(len(profiles)) if self._profile is None else (self._profile, *range(len(profiles)))
        for index in candidates:
            if all(_within(shape, *profiles[index][name]) for name, shape in shapes.items()):
                break
        else:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise BackendError(f"engine {self._name} was not built for such shapes: {found}; build it again")
        if index != self._profile:
            self._check(self._context.set_optimization_profile_async(index, self._stream), f"profile {index}")
            self._profile, self._shapes = index, {}

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
            raise BackendError(f"engine {self._name}: TensorRT refuses {what}{self._logged()}")


def _limits(engine: Any, name: str, profile: int) -> tuple[Shape, Shape]:
    """The least and the largest shape of an input in a profile."""
    least, _, most = engine.get_tensor_profile_shape(name, profile)
    return tuple(least), tuple(most)


def _within(shape: Shape, least: Shape, most: Shape) -> bool:
    return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
