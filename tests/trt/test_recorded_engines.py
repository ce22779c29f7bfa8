"""Engines in CUDA graphs on the doubles: what TensorRT and TensorRT-RTX allow, and what they don't."""

import ctypes
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from bench import Bench
from double import Gpu, trt_double
from onnx import TensorProto, helper

from adavit.errors import BackendError
from adavit.runtime.backends.cuda.capture import Recording
from adavit.runtime.backends.cuda.setter import Setter

FLAVOURS = pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])


def engine(scratch: int = 256, **header: Any) -> bytes:
    """Doubles n numbers, and says which of them are above 0."""
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Greater", ["x", "zero"], ["above"])],
        "double",
        values[:1],
        [values[1], helper.make_tensor_value_info("above", TensorProto.BOOL, ["n"])],
        [helper.make_tensor("zero", TensorProto.INT64, [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    about = {"name": "double", "profiles": [{"x": ((1,), (2,), (4,))}], "scratch": scratch, **header}
    return json.dumps(about).encode() + b"\n" + model.SerializeToString()


class Engine:
    """A context whose numbers are in the bench's first allocation; it writes the second, has the third for itself."""

    def __init__(self, bench: Bench, gpu: Gpu, flavour: str, **header: Any) -> None:
        self.context: Any = None  # the first to go
        trt = trt_double(gpu, flavour)
        self.bench, self.engine = bench, trt.Runtime(trt.ILogger()).deserialize_cuda_engine(engine(**header))
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.config: Any = managed
        if flavour == "tensorrt-rtx":
            self.config = self.engine.create_runtime_config()
            self.config.set_execution_context_allocation_strategy(managed)
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self.config.dynamic_shapes_kernel_specialization_strategy = eager
        self.trt = trt
        self.prepare()

    def prepare(self) -> None:
        self.context = self.engine.create_execution_context(self.config)
        self.context.set_device_memory(self.bench.numbers[2], 256)
        self.context.set_optimization_profile_async(0, int(self.bench.stream))
        self.context.set_input_shape("x", (2,))
        for name, number in (("x", 0), ("y", 1), ("above", 3)):
            self.context.set_tensor_address(name, self.bench.numbers[number])

    def run(self, stream: Any) -> None:
        if not self.context.execute_async_v3(int(stream)):
            raise BackendError("TensorRT refuses to run")

    def put(self, *values: int) -> None:
        self.array(0, np.int64)[:] = values

    def array(self, number: int, dtype: Any) -> Any:
        size = 2 * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_ubyte * size).from_address(self.bench.numbers[number]), dtype)


@FLAVOURS
def test_an_engine_runs_in_a_graph_and_in_a_part_of_one(
    bench: Bench, setter: Setter, machine: Gpu, flavour: str
) -> None:
    found = Engine(bench, machine, flavour)
    found.run(bench.stream)
    with Recording(bench.cuda, bench.stream, setter) as recording:
        condition = recording.condition()
        recording.set([(condition, bench.numbers[5])])
        with recording.when(condition) as body:
            found.run(body)
    executable = recording.instantiate()
    for runs, values in ((1, (3, -4)), (0, (5, 6)), (1, (-7, 8))):
        found.put(*values)
        bench.put(5, runs)
        found.array(1, np.int64)[:] = 0
        executable.launch(bench.stream)
        bench.wait()
        assert found.array(1, np.int64).tolist() == [2 * value * runs for value in values]
        if runs:
            assert found.array(3, bool).tolist() == [value > 0 for value in values]
    executable.close()


def as_new(found: Engine, bench: Bench) -> None:
    bench.wait()
    found.prepare()


def of_other_shapes(found: Engine, bench: Bench) -> None:
    found.context.set_input_shape("x", (1,))


def with_its_own_graphs(found: Engine, bench: Bench) -> None:
    found.config.cuda_graph_strategy = found.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def with_lazy_kernels(found: Engine, bench: Bench) -> None:
    lazy = found.trt.DynamicShapesKernelSpecializationStrategy.LAZY
    found.config.dynamic_shapes_kernel_specialization_strategy = lazy


@FLAVOURS
@pytest.mark.parametrize("change", [as_new, of_other_shapes], ids=lambda fault: fault.__name__)
def test_an_engine_runs_once_before_it_is_recorded(
    bench: Bench, machine: Gpu, flavour: str, change: Callable[..., None]
) -> None:
    found = Engine(bench, machine, flavour)
    found.run(bench.stream)
    change(found, bench)
    with pytest.raises(BackendError, match="refuses"), Recording(bench.cuda, bench.stream):
        found.run(bench.stream)
    found.put(1, 2)
    found.run(bench.stream)
    bench.wait()


@pytest.mark.parametrize("change", [with_its_own_graphs, with_lazy_kernels], ids=lambda fault: fault.__name__)
def test_what_tensorrt_rtx_says_is_not_capturable(bench: Bench, machine: Gpu, change: Callable[..., None]) -> None:
    found = Engine(bench, machine, "tensorrt-rtx")
    found.run(bench.stream)
    assert found.context.is_stream_capturable(int(bench.stream))
    change(found, bench)
    assert not found.context.is_stream_capturable(int(bench.stream))
    with pytest.raises(BackendError, match="refuses"), Recording(bench.cuda, bench.stream):
        found.run(bench.stream)
    bench.wait()


def test_an_engine_that_allocates_is_not_capturable(bench: Bench, machine: Gpu) -> None:
    found = Engine(bench, machine, "tensorrt-rtx", user_allocation=False)
    found.run(bench.stream)
    assert not found.context.is_stream_capturable(int(bench.stream))
    bench.wait()


def test_the_runtime_cache_keeps_kernels(bench: Bench, machine: Gpu) -> None:
    found = Engine(bench, machine, "tensorrt-rtx")
    blob = b""
    for compiled in (1, 0):
        cache = found.config.create_runtime_cache()
        assert not cache.deserialize(b"no cache")
        assert cache.deserialize(blob) == bool(blob)
        found.config.set_runtime_cache(cache)
        found.prepare()
        machine.calls.clear()
        found.run(bench.stream)
        bench.wait()
        assert machine.names("compile") == ["compile"] * compiled
        blob = cache.serialize()


@FLAVOURS
@pytest.mark.parametrize("name, number, said", [("y", 0, "is read too"), ("x", 2, "scratch"), ("y", 2, "scratch")])
def test_memory_is_for_one_thing(bench: Bench, machine: Gpu, flavour: str, name: str, number: int, said: str) -> None:
    """An engine's inputs, outputs and scratch memory."""
    found = Engine(bench, machine, flavour)
    found.context.set_tensor_address(name, bench.numbers[number])
    found.run(bench.stream)
    with pytest.raises(AssertionError, match=said):
        bench.wait()
