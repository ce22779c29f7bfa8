"""A TensorRT engine, and its execution contexts, one for each lane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError
from adavit.runtime.backends.tensorrt.jit import Jit
from adavit.runtime.batch import Room

__all__ = ["Source", "TensorRtEngine"]

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape]]
"""The least and the largest shape of each input."""


@dataclass(frozen=True)
class Source:
    """What an engine comes from.

    Attributes:
        trt: the bindings.
        name: for messages.
        graph: what it was built from, without what is constant in it.
        logged: what TensorRT had to say, in brackets.
        jit: what finishes RTX engines; None of others.
    """

    trt: Any
    name: str
    graph: OnnxGraph
    logged: Callable[[], str]
    jit: Jit | None


class TensorRtEngine:
    """An engine; see `DeviceEngine`.

    Args:
        engine: TensorRT's.
        source: what it comes from.

    Raises:
        BackendError: the engine has other tensors than the graph.
    """

    def __init__(self, engine: Any, source: Source) -> None:
        self.graph, self._engine, self._source = source.graph, engine, source
        inputs = [value.name for value in source.graph.inputs]
        wanted = {*inputs, *(value.name for value in source.graph.outputs)}
        tensors = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        location = source.trt.TensorLocation.DEVICE
        if tensors != wanted or any(engine.get_tensor_location(one) != location for one in wanted):
            raise BackendError(
                f"engine {source.name} has other inputs or outputs than the bundle's graph; build it again"
            )
        self._profiles: list[Profile] = [
            {one: _limits(engine, one, index) for one in inputs} for index in range(engine.num_optimization_profiles)
        ]

    @property
    def most_images(self) -> int:
        """See `DeviceEngine`; only of graphs that take images."""
        return max(profile["images"][1][0] for profile in self._profiles)

    def scratch(self, batch: int) -> int:
        """See `DeviceEngine`: of the profiles, since any may be in use."""
        return max(1, int(self._engine.device_memory_size_v2))

    def runner(self, scratch: int, size: int) -> TensorRtRunner:
        """See `DeviceEngine`."""
        source, engine = self._source, self._engine
        if source.jit is None:
            strategy = source.trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.create_execution_context(strategy)
        else:
            context = source.jit.context(engine)
        if context is None:
            raise BackendError(f"TensorRT made no execution context of engine {source.name}{source.logged()}")
        context.set_device_memory(scratch, size)
        return TensorRtRunner(context, source, self._profiles)

    def close(self) -> None:
        """See `DeviceEngine`."""
        self._engine = None


class TensorRtRunner:
    """An execution context; see `Runner`.

    Args:
        context: TensorRT's, with memory.
        source: what it comes from.
        profiles: the engine's.
    """

    def __init__(self, context: Any, source: Source, profiles: list[Profile]) -> None:
        self._context, self._source, self._profiles = context, source, profiles
        self._inputs = [value.name for value in source.graph.inputs]
        self._profile: int | None = None
        self._wanted = 0
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}
        self._fixed: dict[str, Shape] = {}
        self._stream = 0

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
        """See `Runner`."""
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._check(self._context.set_tensor_address(name, address), f"the address of {name}")
                self._addresses[name] = address
        self._fixed = {name: shapes[name] for name in self._inputs if name not in Room._fields}
        fixed = list(self._fixed.items())
        fitting = [
            index
            for index, profile in enumerate(self._profiles)
            if all(_within(shape, *profile[name]) for name, shape in fixed)
            and all(shapes[name] <= profile[name][1] for name in self._inputs if name in Room._fields)
        ]
        if not fitting:
            found = ", ".join(f"{name} {list(shapes[name])}" for name in self._inputs)
            raise BackendError(f"engine {self._source.name} was not built for such shapes: {found}; build it again")
        self._wanted = fitting[0]

    def run(self, room: Mapping[str, int], stream: int) -> None:
        """See `Runner`."""
        shapes = self._shapes  # and no name for the context: an error's traceback would keep it
        if self._profile != self._wanted:
            self._check(self._context.set_optimization_profile_async(self._wanted, stream), "its profile")
            self._profile = self._wanted
            shapes.clear()
        for name, shape in self._fixed.items():
            if shapes.get(name) != shape:
                self._set_shape(name, shape)
        for name in self._inputs:
            size = room.get(name)
            if size is not None and shapes.get(name) != (size,):
                self._set_shape(name, (size,))
        self._stream = stream
        self._check(self._context.execute_async_v3(stream), "to run")

    def captures(self) -> bool:
        """See `Runner`."""
        asked = getattr(self._context, "is_stream_capturable", None)  # of TensorRT-RTX
        return asked is None or bool(asked(self._stream))

    def close(self) -> None:
        """See `Runner`."""
        self._context = None

    def _set_shape(self, name: str, shape: Shape) -> None:
        self._check(self._context.set_input_shape(name, shape), f"the shape {list(shape)} of {name}")
        self._shapes[name] = shape

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"engine {self._source.name}: TensorRT refuses {what}{self._source.logged()}")


def _limits(engine: Any, name: str, profile: int) -> tuple[Shape, Shape]:
    """The least and the largest shape of an input in a profile."""
    least, _, most = engine.get_tensor_profile_shape(name, profile)
    return tuple(least), tuple(most)


def _within(shape: Shape, least: Shape, most: Shape) -> bool:
    return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
