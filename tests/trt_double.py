"""TensorRT's bindings without TensorRT: an engine is its ONNX file, run by ONNX Runtime when its turn comes."""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from cuda_machine import Gpu, Refused

VERSION = "10.3.0"
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(bool)": "bool"}


class CudaGraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY, EAGER, NONE = range(3)


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class TensorLocation(IntEnum):
    DEVICE, HOST = range(2)


def trt_double(gpu: Gpu, flavour: str = "tensorrt-rtx") -> Any:
    """The part of TensorRT's bindings that is used, of the same names and arguments; or TensorRT-RTX's, with its own.

    As there, a context is recorded into a CUDA graph only after it has run with these shapes, and may not be changed
    as long as the graph is launched. Of TensorRT-RTX, only
    with its own graphs disabled, with kernels that are not specialised lazily, and of an engine that takes its memory
    from outside, which the engine's header says with "user_allocation".
    """
    rtx = flavour == "tensorrt-rtx"

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

        def log(self, severity, msg):
            raise NotImplementedError

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            if "engine" in gpu.refuse:
                self.logger.log(ILogger.ERROR, "the magic tag is another")
                return None
            return ICudaEngine(serialized_engine)

    class ICudaEngine:
        def __init__(self, data):
            header, _, model = bytes(data).partition(b"\n")
            self.about = about = SimpleNamespace(**{"user_allocation": True, **json.loads(header)})
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            about.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            about.inputs = {tensor.name: DTYPES[tensor.type] for tensor in about.session.get_inputs()}
            about.outputs = {tensor.name: DTYPES[tensor.type] for tensor in about.session.get_outputs()}
            about.open = True
            self.num_io_tensors = len(about.inputs) + len(about.outputs)
            self.num_optimization_profiles = len(about.profiles)
            self.device_memory_size_v2 = about.scratch
            gpu.alive["engine"] += 1

        def __del__(self):
            self.about.open = False
            gpu.alive["engine"] -= 1
            gpu.note("engine freed", self.about.name)

        def get_tensor_name(self, index):
            return [*self.about.inputs, *self.about.outputs][index]

        def get_tensor_location(self, name):
            return TensorLocation.DEVICE

        def get_tensor_profile_shape(self, name, profile_index):
            return self.about.profiles[profile_index][name]

        def create_execution_context(self, strategy):
            if isinstance(strategy, IRuntimeConfig):
                config, strategy = strategy, strategy.get_execution_context_allocation_strategy()
            else:
                config = IRuntimeConfig()
            assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
            return None if "context" in gpu.refuse else IExecutionContext(self.about, config)

        if rtx:

            def create_runtime_config(self):
                return IRuntimeConfig()

    class IRuntimeConfig:
        def __init__(self):
            self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
            self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
            self._strategy = ExecutionContextAllocationStrategy.STATIC
            self._cache = None

        def set_execution_context_allocation_strategy(self, strategy):
            self._strategy = strategy

        def get_execution_context_allocation_strategy(self):
            return self._strategy

        def create_runtime_cache(self):
            return IRuntimeCache()

        def set_runtime_cache(self, cache):
            self._cache = cache
            return True

        def get_runtime_cache(self):
            return self._cache

    class IRuntimeCache:
        """Which engines were compiled for which shapes."""

        def __init__(self):
            self.kernels = []

        def serialize(self):
            return json.dumps(["cache", *self.kernels]).encode()

        def deserialize(self, blob):
            try:
                kind, *kernels = json.loads(bytes(blob))
            except ValueError:
                return False
            self.kernels = kernels
            return kind == "cache"

        def reset(self):
            self.kernels = []
            return True

    class IExecutionContext:
        def __init__(self, about, config):
            self.about, self.config = about, config
            self.profile, self.shapes, self.addresses, self.scratch = None, {}, {}, (0, -1)
            self.ran = {}
            self.changes = 0
            gpu.alive["context"] += 1

        def __del__(self):
            assert self.about.open, "a context goes before its engine"
            assert gpu.alive["stream"], "a context goes before the stream"
            gpu.alive["context"] -= 1
            gpu.note("context freed", self.about.name)

        def set_device_memory(self, memory, size):
            gpu.check(memory, size, "device")
            self.changes += 1
            self.scratch = memory, size

        def update_device_memory_size_for_shapes(self):
            assert set(self.shapes) == set(self.about.inputs), "every input has a shape"
            return self.about.scratch

        def set_optimization_profile_async(self, profile_index, stream_handle):
            gpu.stream(stream_handle)
            gpu.note("profile", (self.about.name, profile_index))
            self.changes += 1
            self.profile, self.shapes = self.about.profiles[profile_index], {}
            return True

        def set_input_shape(self, name, shape):
            least, _, most = self.profile[name]
            within = all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
            gpu.note("shape", (self.about.name, name, tuple(shape)))
            self.changes += 1
            self.shapes[name] = tuple(shape)
            return within and "shape" not in gpu.refuse

        def set_tensor_address(self, name, memory):
            assert memory % 256 == 0
            gpu.note("address", (self.about.name, name))
            self.changes += 1
            self.addresses[name] = memory
            return True

        if rtx:

            def is_stream_capturable(self, stream):
                gpu.stream(stream)
                config = self.config
                return (
                    self.about.user_allocation
                    and config.cuda_graph_strategy == CudaGraphStrategy.DISABLED
                    and config.dynamic_shapes_kernel_specialization_strategy
                    != DynamicShapesKernelSpecializationStrategy.LAZY
                    and "capture" not in gpu.refuse
                )

        def execute_async_v3(self, stream_handle):
            about, shapes, addresses = self.about, dict(self.shapes), dict(self.addresses)
            assert self.profile is not None
            assert set(shapes) == set(about.inputs), "every input has a shape"
            assert set(addresses) == {*about.inputs, *about.outputs}, "every tensor has an address"
            assert self.scratch[1] >= about.scratch, "the scratch memory is large enough"
            scratch = self.scratch
            unchanged = _unchanged(self, gpu.stream(stream_handle).capture is not None)

            def run():
                gpu.check(*scratch, "device")
                own = np.frombuffer((ctypes.c_ubyte * about.scratch).from_address(scratch[0]), np.uint8)
                inputs = {name: _at(gpu, addresses[name], shapes[name], dtype) for name, dtype in about.inputs.items()}
                for name, value in inputs.items():
                    assert not np.may_share_memory(value, own), f"{name} is scratch memory too"
                own[...] = 0xFF
                given = {name: value.copy() for name, value in inputs.items()}
                for name, value in zip(about.outputs, about.session.run(list(about.outputs), given), strict=True):
                    found = _at(gpu, addresses[name], value.shape, about.outputs[name])
                    assert not any(np.may_share_memory(found, one) for one in inputs.values()), f"{name} is read too"
                    assert not np.may_share_memory(found, own), f"{name} is scratch memory too"
                    found[...] = value

            try:
                if self.ran != shapes or (rtx and not self.is_stream_capturable(stream_handle)):
                    gpu.only_without_recording(stream_handle)  # it allocates, or compiles kernels
                if "capture" in gpu.refuse:
                    gpu.only_without_recording(stream_handle)
                gpu.enqueue(lambda: (unchanged(), run()), stream_handle)
            except Refused:
                return False
            gpu.note("run", about.name)
            self.ran = shapes
            cache, kernels = self.config.get_runtime_cache(), [about.name, *map(list, shapes.values())]
            if cache is not None and kernels not in cache.kernels:
                gpu.note("compile", about.name)
                cache.kernels.append(kernels)
            return "run" not in gpu.refuse

    names = SimpleNamespace(
        __version__=VERSION,
        ILogger=ILogger,
        Runtime=Runtime,
        ICudaEngine=ICudaEngine,
        IExecutionContext=IExecutionContext,
        TensorLocation=TensorLocation,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
    )
    if rtx:
        names.IRuntimeConfig, names.IRuntimeCache = IRuntimeConfig, IRuntimeCache
        names.CudaGraphStrategy = CudaGraphStrategy
        names.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
    return names


def _unchanged(context: Any, recorded: bool) -> Callable[[], None]:
    """Checks that a context is still there and, where it was recorded, that nothing of it was changed since."""
    found, changes = weakref.ref(context), context.changes

    def check() -> None:
        context = found()
        assert context is not None, "a context goes after what it runs"
        assert not recorded or context.changes == changes, "a context that was recorded is changed"

    return check


def _at(gpu: Gpu, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    gpu.check(address, size, "device")
    raw = (ctypes.c_ubyte * size).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)
