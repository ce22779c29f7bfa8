"""A GPU, CUDA and TensorRT that are not there: what is enqueued is put off until somebody waits for it.

Device memory is host memory at real addresses, and an engine is its ONNX file run by ONNX Runtime when its turn
comes, so that a buffer reused too early, or read before it is there, gives wrong numbers. Every call is recorded.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from cases import read_config, write_config

from adavit.bundle.bundle import Bundle
from adavit.bundle.engine_sets import source_of, this_platform
from adavit.bundle.graph_keys import graph_keys, read_graph
from adavit.bundle.graphs import Graphs
from adavit.files import sha256
from adavit.tensorrt.profiles import profiles_of

VERSION, CAPABILITY, STREAM = "10.3.0", 87, 5
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def add_double_engines(bundle: Path, flavour: str = "tensorrt", max_batch: int = 8, **changes: Any) -> Path:
    """Adds a set of engines that the double reads: their profiles, then the complete ONNX model."""
    graphs = Graphs(Bundle.open(bundle))
    folder = bundle / "tensorrt" / "double"
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for number, key in enumerate(graph_keys(graphs.files)):
        graph = read_graph(graphs, key)
        profiles = profiles_of(graph.inputs, key.block, graphs.architecture, None, max_batch)
        if key.name.endswith(".mlp"):  # cut in two, to see profiles change
            (whole,) = profiles
            profiles = [{**whole, "tokens": ((1,), (5,), (5,))}, whole]
        header = {"name": key.name, "profiles": profiles, "scratch": 1000 * number}
        data = json.dumps(header).encode() + b"\n" + graph.model(graph.arrays(graphs.tensors))
        (folder / f"{key.name}.engine").write_bytes(data)
        stored = {"file": f"tensorrt/double/{key.name}.engine", "bytes": len(data), "sha256": sha256(data)}
        described.append({**key.to_dict(), **stored, "source": source_of(graphs.files, key)})
    config = read_config(bundle)
    config.setdefault("engine_sets", {})["double"] = {
        "flavour": flavour, "version": VERSION, "platform": this_platform(), "compute_capabilities": [CAPABILITY],
        "hardware_compatible": False, "version_compatible": False, "stripped": False, "precision": graphs.precision,
        "engines": described, **changes,
    }  # fmt: skip
    write_config(bundle, config)
    return bundle


def described_engine(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What `config.json` says of one of the double's engines, by the name of its file."""
    engines = config["engine_sets"]["double"]["engines"]
    return next(engine for engine in engines if Path(engine["file"]).name == f"{name}.engine")


class Gpu:
    """The device: memory, one queue of work, events, and the record of what happened."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.memory: dict[int, tuple[str, Any, int]] = {}
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.alive: dict[str, int] = {"stream": 0, "event": 0, "graph": 0, "exec": 0, "context": 0, "engine": 0}
        self.refuse: set[str] = set()
        self.working = threading.RLock()  # one stream does one thing at a time

    def note(self, call: str, detail: Any = None) -> None:
        self.calls.append((call, detail))

    def names(self, *kinds: str) -> list[str]:
        return [name for name, _ in self.calls if not kinds or name in kinds]

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.capturing is None else self.capturing).append(work)

    def work(self) -> None:
        """Does what was put off."""
        assert self.capturing is None, "nobody may wait while a graph is captured"
        self.work_until(lambda: not self.queue)

    def work_until(self, done: Callable[[], bool]) -> None:
        with self.working:
            while not done():
                self.queue.pop(0)()

    def allocate(self, kind: str, size: int) -> int:
        raw = (ctypes.c_ubyte * (size + 256))(*b"")
        ctypes.memset(raw, 0xFF, size + 256)  # not a number
        address = -(-ctypes.addressof(raw) // 256) * 256
        self.memory[address] = kind, raw, size
        return address

    def free(self, kind: str, address: int) -> None:
        assert self.memory[address][0] == kind, f"{kind} memory freed as another kind, or twice"
        self.work()  # as CUDA does
        del self.memory[address]

    def check(self, address: int, size: int, kind: str) -> None:
        """That these bytes are within one allocation of a kind."""
        assert any(
            start <= address and address + size <= start + length and kind == found
            for start, (found, _, length) in list(self.memory.items())
        ), f"{size} bytes at {address:#x} are no {kind} memory"


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorNoDevice = 100
    cudaErrorNotReady = 600


class Event:
    def __init__(self) -> None:
        self.done = True
        self.at = 0


def cuda_double(gpu: Gpu) -> Any:
    """The functions of `cuda.bindings.runtime` that are used, of the same names and arguments."""
    kinds = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    attributes = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    ok = Status.cudaSuccess
    ends = {1: ("device", "host"), 2: ("host", "device"), 3: ("device", "device")}

    class Runtime:
        cudaMemcpyKind = kinds
        cudaDeviceAttr = attributes
        cudaError_t = Status
        cudaStreamNonBlocking = 1
        cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

        def cudaGetDeviceCount(self):
            return (Status.cudaErrorNoDevice, None) if "device" in gpu.refuse else (ok, 1)

        def cudaGetErrorString(self, error):
            return ok, b"a reason"

        def cudaGetDevice(self):
            return ok, 0

        def cudaDeviceGetAttribute(self, attr, device):
            return ok, CAPABILITY // 10 if attr == 75 else CAPABILITY % 10

        def cudaMalloc(self, size):
            return ok, gpu.allocate("device", size)

        def cudaMallocHost(self, size):
            return ok, gpu.allocate("host", size)

        def cudaFree(self, devPtr):
            gpu.free("device", devPtr)
            return (ok,)

        def cudaFreeHost(self, ptr):
            gpu.free("host", ptr)
            return (ok,)

        def cudaMemcpyAsync(self, dst, src, count, kind, stream):
            target, source = ends[kind]
            gpu.check(dst, count, target)
            gpu.check(src, count, source)
            gpu.note("copy", (kind, count))
            gpu.enqueue(lambda: ctypes.memmove(dst, src, count) and None)
            return (ok,)

        def cudaStreamCreateWithFlags(self, flags):
            gpu.alive["stream"] += 1
            return ok, STREAM

        def cudaStreamDestroy(self, stream):
            assert not gpu.queue, "the stream goes last"
            assert gpu.alive["stream"] > 1 or gpu.alive["event"] == 0, "the stream goes last"
            gpu.alive["stream"] -= 1
            gpu.note("stream freed")
            return (ok,)

        def cudaStreamSynchronize(self, stream):
            gpu.work()
            gpu.note("synchronise")
            return (ok,)

        def cudaEventCreateWithFlags(self, flags):
            gpu.alive["event"] += 1
            return ok, Event()

        def cudaEventRecord(self, event, stream):
            assert gpu.capturing is None
            event.done = False
            gpu.enqueue(lambda: setattr(event, "done", True))
            return (ok,)

        def cudaEventSynchronize(self, event):
            gpu.work_until(lambda: event.done)
            gpu.note("synchronise")
            return (ok,)

        def cudaEventQuery(self, event):
            return (ok if event.done else Status.cudaErrorNotReady,)

        def cudaEventElapsedTime(self, start, end):
            assert start.done and end.done
            return ok, 0.25

        def cudaEventDestroy(self, event):
            gpu.alive["event"] -= 1
            return (ok,)

        def cudaStreamBeginCapture(self, stream, mode):
            gpu.capturing = []
            return (ok,)

        def cudaStreamEndCapture(self, stream):
            found, gpu.capturing = gpu.capturing, None
            gpu.alive["graph"] += 1
            return ok, found

        def cudaGraphInstantiate(self, graph, flags):
            gpu.alive["exec"] += 1
            return ok, list(graph)

        def cudaGraphDestroy(self, graph):
            gpu.alive["graph"] -= 1
            return (ok,)

        def cudaGraphLaunch(self, graphExec, stream):
            assert gpu.capturing is None
            gpu.note("launch")
            gpu.queue.extend(graphExec)
            return (ok,)

        def cudaGraphExecDestroy(self, graphExec):
            assert not gpu.queue, "a graph may be running"
            gpu.alive["exec"] -= 1
            gpu.note("graph freed")
            return (ok,)

    return Runtime()


def trt_double(gpu: Gpu) -> Any:
    """The part of TensorRT's bindings that is used, of the same names and arguments."""
    user_managed, device_location = "user managed", "on the device"

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
            header, _, model = data.partition(b"\n")
            self.about = about = SimpleNamespace(**json.loads(header))
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
            return device_location

        def get_tensor_profile_shape(self, name, profile_index):
            return self.about.profiles[profile_index][name]

        def create_execution_context(self, strategy):
            assert strategy == user_managed
            return None if "context" in gpu.refuse else IExecutionContext(self.about)

    class IExecutionContext:
        def __init__(self, about):
            self.about = about
            self.profile, self.shapes, self.addresses, self.scratch = None, {}, {}, (0, -1)
            gpu.alive["context"] += 1

        def __del__(self):
            assert self.about.open, "a context goes before its engine"
            assert gpu.alive["stream"], "a context goes before the stream"
            gpu.alive["context"] -= 1
            gpu.note("context freed", self.about.name)

        def set_device_memory(self, memory, size):
            gpu.check(memory, size, "device")
            self.scratch = memory, size

        def set_optimization_profile_async(self, profile_index, stream_handle):
            gpu.note("profile", (self.about.name, profile_index))
            self.profile, self.shapes = self.about.profiles[profile_index], {}
            return True

        def set_input_shape(self, name, shape):
            least, _, most = self.profile[name]
            within = all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
            gpu.note("shape", (self.about.name, name, tuple(shape)))
            self.shapes[name] = shape
            return within and "shape" not in gpu.refuse

        def set_tensor_address(self, name, memory):
            assert memory % 256 == 0
            gpu.note("address", (self.about.name, name))
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            about, shapes, addresses = self.about, dict(self.shapes), dict(self.addresses)
            assert stream_handle == STREAM and self.profile is not None
            assert set(shapes) == set(about.inputs), "every input has a shape"
            assert set(addresses) == {*about.inputs, *about.outputs}, "every tensor has an address"
            assert self.scratch[1] >= about.scratch, "the scratch memory is large enough"
            scratch = self.scratch
            gpu.note("run", about.name)

            def run():
                gpu.check(*scratch, "device")
                inputs = {name: _at(gpu, addresses[name], shapes[name], dtype) for name, dtype in about.inputs.items()}
                computed = about.session.run(
                    list(about.outputs), {name: value.copy() for name, value in inputs.items()}
                )
                for name, value in zip(about.outputs, computed, strict=True):
                    _at(gpu, addresses[name], value.shape, about.outputs[name])[...] = value

            gpu.enqueue(run)
            return "run" not in gpu.refuse

    return SimpleNamespace(
        __version__=VERSION,
        ILogger=ILogger,
        Runtime=Runtime,
        ICudaEngine=ICudaEngine,
        IExecutionContext=IExecutionContext,
        TensorLocation=SimpleNamespace(DEVICE=device_location),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=user_managed),
    )


def _at(gpu: Gpu, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    gpu.check(address, size, "device")
    raw = (ctypes.c_ubyte * size).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)
