"""The part of CUDA's runtime that the TensorRT backend uses, through NVIDIA's cuda-python."""

from __future__ import annotations

from typing import Any

from adavit.errors import BackendError, install_hint

__all__ = ["Cuda"]


def import_runtime() -> Any:
    """NVIDIA's bindings of the CUDA runtime."""
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError) as error:
        raise BackendError(
            f"cuda-python is not installed ({error}); run: {install_hint('tensorrt-rtx')}; or the extra tensorrt"
        ) from None
    return runtime


class Cuda:
    """Calls of the CUDA runtime, whose failures are BackendErrors.

    Attributes:
        runtime: the module `cuda.bindings.runtime`.

    Raises:
        BackendError: cuda-python is not installed, or finds no GPU that can be used.
    """

    def __init__(self) -> None:
        self.runtime = import_runtime()
        try:
            count = self.call("cudaGetDeviceCount")
        except (BackendError, RuntimeError) as error:  # RuntimeError: cuda-python before 12.9, without a driver
            raise BackendError(f"no NVIDIA GPU can be used here: {error}") from None
        if not count:
            raise BackendError("no NVIDIA GPU can be used here: CUDA finds none")

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a function of the CUDA runtime, by its name.

        Raises:
            BackendError: it failed.
        """
        status, *results = getattr(self.runtime, name)(*arguments)
        if int(status):
            text = self.runtime.cudaGetErrorString(status)[1]
            raise BackendError(f"{name} failed: {text.decode()} (CUDA error {int(status)})")
        return results[0] if results else None

    def ready(self, event: Any) -> bool:
        """Whether all that was enqueued before an event was recorded is done."""
        return int(self.runtime.cudaEventQuery(event)[0]) == int(self.runtime.cudaError_t.cudaSuccess)

    def compute_capability(self) -> int:
        """Of the device in use; 86 is 8.6."""
        kinds, device = self.runtime.cudaDeviceAttr, self.call("cudaGetDevice")
        major = self.call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMajor, device)
        minor = self.call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMinor, device)
        return 10 * int(major) + int(minor)
