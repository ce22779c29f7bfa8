"""The kernel that sets the conditions of a CUDA graph from numbers on the device; NVRTC compiles it at run time."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from adavit.errors import BackendError, one_line
from adavit.runtime.backends.cuda.bindings import Cuda, checked

__all__ = ["OLDEST", "Setter", "compiled"]

OLDEST = 12040
"""CUDA 12.4: the first whose conditional nodes are used."""
NAME = b"set_conditions"
SOURCE = b"""
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(unsigned long long, unsigned int);
extern "C" __global__ void set_conditions(unsigned long long first, const long long *first_size,
                                          unsigned long long second, const long long *second_size) {
    if (threadIdx.x == 0) cudaGraphSetConditional(first, *first_size > 0);
    if (threadIdx.x == 1) cudaGraphSetConditional(second, *second_size > 0);
}
"""
TYPES = (ctypes.c_ulonglong, ctypes.c_void_p) * 2
"""Of the kernel's parameters."""


class Setter:
    """The kernel, loaded onto the device in use.

    Args:
        cuda: the bindings.

    Raises:
        BackendError: conditional nodes cannot be used here; the message says why.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        for what, version in (
            ("the driver is for", int(cuda.call("cudaDriverGetVersion"))),
            ("cuda-bindings is for", int(cuda.runtime.CUDART_VERSION)),
        ):
            if version < OLDEST:
                found = f"{version // 1000}.{version % 1000 // 10}"
                raise BackendError(f"conditional nodes of CUDA graphs need CUDA 12.4; {what} CUDA {found}")
        image = compiled(cuda.nvrtc, cuda.compute_capability())
        cuda.call("cudaSetDevice", cuda.call("cudaGetDevice"))  # makes its context current, which the driver needs
        self._module = cuda.call_driver("cuModuleLoadData", image)
        self._kernel = cuda.call_driver("cuModuleGetFunction", self._module, NAME)

    def launch(self, stream: Any, sizes: Sequence[tuple[Any, int]]) -> None:
        """Enqueues setting conditions: each holds where its number is above 0.

        Args:
            stream: where to enqueue.
            sizes: the handles of conditions, each with the device's address of an int64.
        """
        for first in range(0, len(sizes), 2):
            pair = sizes[first : first + 2]
            values = [int(value) for both in pair for value in both] + [0, 0] * (2 - len(pair))
            grid, block, shared = (1, 1, 1), (len(pair), 1, 1), 0
            parameters = (tuple(values), TYPES)
            self._cuda.call_driver("cuLaunchKernel", self._kernel, *grid, *block, shared, stream, parameters, 0)

    def close(self) -> None:
        """Unloads the kernel; no graph that has it may run any more."""
        self._cuda.call_driver("cuModuleUnload", self._module)


@lru_cache(maxsize=8)
def compiled(nvrtc: Any, capability: int) -> bytes:
    """The kernel as a CUBIN for a compute capability; 86 is 8.6.

    Raises:
        BackendError: NVRTC is not installed, too old for this compute capability, or fails.
    """
    try:
        version, known = _call(nvrtc, "nvrtcVersion"), _call(nvrtc, "nvrtcGetSupportedArchs")
    except RuntimeError as error:
        raise BackendError(f"NVRTC is missing ({one_line(error)}); run: pip install 'cuda-bindings[all]'") from None
    if capability not in known:
        found, wanted = ".".join(map(str, version)), f"{capability // 10}.{capability % 10}"
        raise BackendError(
            f"NVRTC {found} does not know compute capability {wanted}; install a newer cuda-bindings[all]"
        )
    program = _call(nvrtc, "nvrtcCreateProgram", SOURCE, NAME + b".cu", 0, [], [])
    try:
        _call(nvrtc, "nvrtcCompileProgram", program, 1, [b"--gpu-architecture=sm_%d" % capability])
        image = bytearray(_call(nvrtc, "nvrtcGetCUBINSize", program))
        _call(nvrtc, "nvrtcGetCUBIN", program, image)
    finally:
        _call(nvrtc, "nvrtcDestroyProgram", program)
    return bytes(image)


def _call(nvrtc: Any, name: str, *arguments: Any) -> Any:
    return checked(nvrtc, "nvrtcGetErrorString", name, *arguments)
