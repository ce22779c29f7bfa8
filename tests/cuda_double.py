"""CUDA's bindings on a GPU that is not there: the functions that are used, of the same names and arguments."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from enum import IntEnum
from functools import wraps
from types import FunctionType, SimpleNamespace
from typing import Any

from cuda_machine import Event, Gpu, Refused, Status

__all__ = ["CAPABILITY", "Gpu", "cuda_double", "driver_double", "nvrtc_double"]

CAPABILITY = 87
ENDS = {1: ("device", "host"), 2: ("host", "device"), 3: ("device", "device")}
IN_12 = {
    "cudaGraphAddNode": "cudaGraphAddNode_v2",
    "cudaStreamGetCaptureInfo": "cudaStreamGetCaptureInfo_v3",
    "cudaStreamUpdateCaptureDependencies": "cudaStreamUpdateCaptureDependencies_v2",
}
TYPES = {"unsigned long long": ctypes.c_ulonglong, "const long long *": ctypes.c_void_p}


class Code(IntEnum):
    """Statuses of the driver and of NVRTC."""

    SUCCESS = 0
    NVRTC_ERROR_INVALID_OPTION = 5
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_NOT_FOUND = 500


class Number:
    """What bindings give for a handle that is a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __int__(self) -> int:
        return self.number


def module(kind: type, renamed: dict[str, str] | None = None) -> Any:
    """An object of a class whose functions return their status first, as a tuple."""
    parts = {}
    for name, value in vars(kind).items():
        if not name.startswith("__"):
            parts[(renamed or {}).get(name, name)] = with_status(value) if isinstance(value, FunctionType) else value
    return type(kind.__name__, (), parts)()


def with_status(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    @wraps(function)
    def called(*arguments: Any) -> tuple[Any, ...]:
        try:
            found = function(*arguments)
        except Refused as refused:
            return refused.status, None
        success = Status.cudaSuccess
        return (success, *found) if isinstance(found, tuple) else (success,) if found is None else (success, found)

    return called


def cuda_double(gpu: Gpu) -> Any:
    """The functions of `cuda.bindings.runtime`, for the major version of the bindings."""

    class ConditionalParams:
        __slots__ = ("handle", "phGraph_out", "size", "type")

    class NodeParams:
        __slots__ = ("conditional", "type")

        def __init__(self) -> None:
            self.conditional = ConditionalParams()

    def needs(version: int) -> None:
        if gpu.driver < version:
            raise Refused(Status.cudaErrorCallRequiresNewerDriver)

    class Runtime:
        CUDART_VERSION = 12090 if gpu.bindings == 12 else 13000
        cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
        cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
        cudaError_t = Status
        cudaStreamNonBlocking = 1
        cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        cudaStreamUpdateCaptureDependenciesFlags = SimpleNamespace(cudaStreamSetCaptureDependencies=1)
        cudaGraphConditionalHandleFlags = SimpleNamespace(cudaGraphCondAssignDefault=1)
        cudaGraphConditionalNodeType = SimpleNamespace(cudaGraphCondTypeIf=0)
        cudaGraphNodeType = SimpleNamespace(cudaGraphNodeTypeConditional=13)
        cudaGraphNodeParams = NodeParams

        def cudaGetDeviceCount(self):
            if "device" in gpu.refuse:
                raise Refused(Status.cudaErrorNoDevice)
            return 1

        def cudaGetErrorString(self, error):
            return b"a reason"

        def cudaGetDevice(self):
            return 0

        def cudaSetDevice(self, device):
            assert device == 0

        def cudaDriverGetVersion(self):
            return gpu.driver

        def cudaDeviceGetAttribute(self, attr, device):
            return CAPABILITY // 10 if attr == 75 else CAPABILITY % 10

        def cudaMalloc(self, size):
            return gpu.allocate("device", size)

        def cudaMallocHost(self, size):
            return gpu.allocate("host", size)

        def cudaFree(self, devPtr):
            gpu.free("device", devPtr)

        def cudaFreeHost(self, ptr):
            gpu.free("host", ptr)

        def cudaMemcpyAsync(self, dst, src, count, kind, stream):
            def copy():
                for address, place in zip((dst, src), ENDS[kind], strict=True):
                    gpu.check(address, count, place)
                ctypes.memmove(dst, src, count)

            for address, place in zip((dst, src), ENDS[kind], strict=True):
                gpu.check(address, count, place)
            gpu.note("copy", (kind, count))
            gpu.enqueue(copy, stream)

        def cudaMemsetAsync(self, devPtr, value, count, stream):
            def fill():
                gpu.check(devPtr, count, "device")
                ctypes.memset(devPtr, value, count)

            gpu.check(devPtr, count, "device")
            gpu.note("fill", count)
            gpu.enqueue(fill, stream)

        def cudaStreamCreateWithFlags(self, flags):
            return gpu.new_stream()

        def cudaStreamDestroy(self, stream):
            gpu.destroy_stream(stream)
            gpu.note("stream freed")

        def cudaStreamSynchronize(self, stream):
            gpu.synchronise(stream)
            gpu.note("synchronise")

        def cudaStreamWaitEvent(self, stream, event, flags):
            gpu.wait_for(stream, event)

        def cudaEventCreateWithFlags(self, flags):
            gpu.alive["event"] += 1
            return Event()

        def cudaEventRecord(self, event, stream):
            gpu.record(event, stream)

        def cudaEventSynchronize(self, event):
            if not gpu.finished(event):
                gpu.reach(event.moment)
            gpu.note("synchronise")

        def cudaEventQuery(self, event):
            if not gpu.finished(event):
                raise Refused(Status.cudaErrorNotReady)

        def cudaEventElapsedTime(self, start, end):
            assert gpu.finished(start) and gpu.finished(end)
            return 0.25

        def cudaEventDestroy(self, event):
            gpu.alive["event"] -= 1

        def cudaStreamBeginCapture(self, stream, mode):
            assert mode == 1
            gpu.begin(stream)
            gpu.note("begin")

        def cudaStreamBeginCaptureToGraph(self, stream, graph, dependencies, dependencyData, numDependencies, mode):
            needs(12030)
            assert mode == 1 and len(dependencies or ()) == numDependencies
            gpu.begin(stream, graph, dependencies or ())

        def cudaStreamEndCapture(self, stream):
            return gpu.end(stream)

        def cudaStreamGetCaptureInfo(self, stream):
            last = list(gpu.recorded_so_far(stream).last)
            return 1, 1, gpu.stream(stream).capture.graph, last, [SimpleNamespace() for _ in last], len(last)

        def cudaStreamUpdateCaptureDependencies(self, stream, dependencies, dependencyData, numDependencies, flags):
            assert flags == 1 and len(dependencies) == numDependencies
            gpu.recorded_so_far(stream).last = list(dependencies)

        def cudaGraphConditionalHandleCreate(self, graph, defaultLaunchValue, flags):
            needs(12030)
            assert flags == 1, "without the flag the value of the last launch stays"
            return Number(gpu.new_condition(graph, defaultLaunchValue))

        def cudaGraphAddNode(self, graph, pDependencies, dependencyData, numDependencies, nodeParams):
            needs(12030)
            assert len(pDependencies) == len(dependencyData) == numDependencies and nodeParams.type == 13
            chosen = nodeParams.conditional
            assert (chosen.type, chosen.size) == (0, 1)
            node, body = gpu.add_if(graph, pDependencies, int(chosen.handle))
            chosen.phGraph_out = [body]
            return node

        def cudaGraphInstantiate(self, graph, flags):
            return gpu.instantiate(graph)

        def cudaGraphDestroy(self, graph):
            gpu.destroy_graph(graph)

        def cudaGraphLaunch(self, graphExec, stream):
            gpu.launch(graphExec, stream)
            gpu.note("launch")

        def cudaGraphExecDestroy(self, graphExec):
            gpu.destroy_executable(graphExec)
            gpu.note("graph freed")

    return module(Runtime, IN_12 if gpu.bindings == 12 else None)


def driver_double(gpu: Gpu) -> Any:
    """The functions of `cuda.bindings.driver`; of kernels it knows the one that sets conditions."""

    class Driver:
        def cuGetErrorString(self, error):
            return b"a reason"

        def cuModuleLoadData(self, image):
            gpu.not_while_recording()
            made_for, _, source = bytes(image).partition(b"\n")
            if made_for != b"sm_%d" % CAPABILITY:
                raise Refused(Code.CUDA_ERROR_NO_BINARY_FOR_GPU)
            gpu.alive["module"] += 1
            return source.decode()

        def cuModuleGetFunction(self, hmod, name):
            found = re.search(rf"__global__ void {name.decode()}\(([^)]*)\)", hmod)
            if found is None:
                raise Refused(Code.CUDA_ERROR_NOT_FOUND)
            return [TYPES[re.sub(r"\w+$", "", one.strip()).strip()] for one in found[1].split(",")]

        def cuModuleUnload(self, hmod):
            gpu.alive["module"] -= 1

        def cuLaunchKernel(
            self, f, gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ,
            sharedMemBytes, hStream, kernelParams, extra,
        ):  # fmt: skip
            values, types = kernelParams
            assert list(types) == f and len(values) == len(types) and not extra
            assert (gridDimX, gridDimY, gridDimZ, blockDimY, blockDimZ, sharedMemBytes) == (1, 1, 1, 1, 1, 0)
            taken = [kind(value).value for kind, value in zip(types, values, strict=True)]

            def set_conditions():
                for handle, address in list(zip(taken[::2], taken[1::2], strict=True))[:blockDimX]:
                    gpu.check(address, 8, "device")
                    gpu.conditions[handle].value = int(ctypes.c_int64.from_address(address).value > 0)

            gpu.note("set", blockDimX)
            gpu.enqueue(set_conditions, hStream)

    return module(Driver)


def nvrtc_double(gpu: Gpu) -> Any:
    """The functions of `cuda.bindings.nvrtc`; a CUBIN is the source with its architecture."""
    refuse = gpu.refuse  # not the device: what was compiled is kept with this module

    class Nvrtc:
        def nvrtcGetErrorString(self, result):
            return b"a reason"

        def nvrtcVersion(self):
            if "nvrtc" in refuse:
                raise RuntimeError("no libnvrtc.so.13")
            return 13, 0

        def nvrtcGetSupportedArchs(self):
            return [75, 80, 86] if "architecture" in refuse else [75, 80, 86, CAPABILITY, 90, 100, 120]

        def nvrtcCreateProgram(self, src, name, numHeaders, headers, includeNames):
            assert (numHeaders, headers, includeNames) == (0, [], [])
            return {"source": src}

        def nvrtcCompileProgram(self, prog, numOptions, options):
            found = re.fullmatch(rb"--gpu-architecture=(sm_\d+)", options[0])
            if found is None or numOptions != 1 or "compile" in refuse:
                raise Refused(Code.NVRTC_ERROR_INVALID_OPTION)
            prog["cubin"] = found[1] + b"\n" + prog["source"]

        def nvrtcGetCUBINSize(self, prog):
            return len(prog["cubin"])

        def nvrtcGetCUBIN(self, prog, cubin):
            cubin[:] = prog["cubin"]

        def nvrtcDestroyProgram(self, prog):
            prog.clear()

    return module(Nvrtc)
