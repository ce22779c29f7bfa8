"""The part of CUDA that backends on a device use, through NVIDIA's cuda-bindings 12 and 13."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import Any

from adavit.errors import BackendError, install_hint

__all__ = ["Cuda"]

NAMES_12 = {
    "cudaGraphAddNode": "cudaGraphAddNode_v2",
    "cudaStreamGetCaptureInfo": "cudaStreamGetCaptureInfo_v3",
    "cudaStreamUpdateCaptureDependencies": "cudaStreamUpdateCaptureDependencies_v2",
}
"""What CUDA 12 calls the functions that CUDA 13 has under a plain name, with the same arguments."""
CHECK = "nvidia-smi shows GPUs and their driver"


def import_runtime() -> Any:
    """NVIDIA's bindings of the CUDA runtime."""
    return _imported("runtime")


def import_driver() -> Any:
    """NVIDIA's bindings of the CUDA driver."""
    return _imported("driver")


def import_nvrtc() -> Any:
    """NVIDIA's bindings of NVRTC, which compiles kernels; NVRTC itself may be missing."""
    return _imported("nvrtc")


def _imported(name: str) -> Any:
    try:
        return import_module(f"cuda.bindings.{name}")
    except (ImportError, OSError) as error:
        raise BackendError(
            f"cuda-bindings is not installed ({error}); run: {install_hint('tensorrt-rtx')}; or the extra tensorrt"
        ) from None


class Cuda:
    """Calls of CUDA, whose failures are BackendErrors.

    Attributes:
        runtime: the module `cuda.bindings.runtime`.

    Raises:
        BackendError: cuda-bindings is not installed, or finds no GPU that can be used.
    """

    def __init__(self) -> None:
        self.runtime = import_runtime()
        self._names = NAMES_12 if self.runtime.CUDART_VERSION < 13000 else {}
        try:
            count = self.call("cudaGetDeviceCount")
        except (BackendError, RuntimeError) as error:  # RuntimeError: cuda-bindings before 12.9, without a driver
            raise BackendError(f"no NVIDIA GPU can be used here: {error}; {CHECK}") from None
        if not count:
            raise BackendError(f"no NVIDIA GPU can be used here: CUDA finds none; {CHECK}")

    @cached_property
    def driver(self) -> Any:
        """The module `cuda.bindings.driver`."""
        return import_driver()

    @cached_property
    def nvrtc(self) -> Any:
        """The module `cuda.bindings.nvrtc`."""
        return import_nvrtc()

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function of the CUDA runtime returns, by its name in CUDA 13; a tuple where that is more than one.

        Raises:
            BackendError: it failed.
        """
        return checked(self.runtime, "cudaGetErrorString", self._names.get(name, name), *arguments)

    def call_driver(self, name: str, *arguments: Any) -> Any:
        """As `call`, of the CUDA driver."""
        return checked(self.driver, "cuGetErrorString", name, *arguments)

    def ready(self, event: Any) -> bool:
        """Whether all that was enqueued before an event was recorded is done."""
        return int(self.runtime.cudaEventQuery(event)[0]) == int(self.runtime.cudaError_t.cudaSuccess)

    def compute_capability(self) -> int:
        """Of the device in use; 86 is 8.6."""
        kinds, device = self.runtime.cudaDeviceAttr, self.call("cudaGetDevice")
        major = self.call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMajor, device)
        minor = self.call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMinor, device)
        return 10 * int(major) + int(minor)


def checked(module: Any, describe: str, name: str, *arguments: Any) -> Any:
    """What a function of a module of the bindings returns, without its status.

    Args:
        module: of cuda.bindings.
        describe: its function that puts a status into words.
        name: the function.
        arguments: what it takes.

    Raises:
        BackendError: it failed.
    """
    status, *results = getattr(module, name)(*arguments)
    if int(status):
        text = getattr(module, describe)(status)[1]
        raise BackendError(f"{name} failed: {text.decode()} (CUDA error {int(status)})")
    if len(results) > 1:
        return tuple(results)
    return results[0] if results else None
