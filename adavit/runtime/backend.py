"""What the dispatcher asks of a backend: load an engine's bytes, run it on arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from adavit.errors import BackendError
from adavit.runtime.bundle import EngineSpec

__all__ = ["Backend", "Buffer", "Engine", "Options", "create_backend", "names"]


@dataclass(frozen=True)
class Options:
    """How a backend is to run.

    Attributes:
        threads: CPU threads.
        provider: the backend's own name of what executes, such as ONNX Runtime's CPUExecutionProvider.
        parallel: "operators" to share the threads inside every engine, for the lowest latency of one image;
            "samples" to run an image on each thread, for the highest throughput of batches.
    """

    threads: int
    provider: str | None = None
    parallel: str = "operators"


class Buffer(Protocol):
    """Memory that engines read and write where it is, prepared once for many runs.

    Attributes:
        array: the memory, float32.
    """

    array: npt.NDArray[np.float32]

    def rows(self, count: int) -> Any:
        """The first `count` rows, as `Engine.run` takes them."""
        ...


class Engine(Protocol):
    """A loaded engine; safe to run from several threads at once."""

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Runs, in the order of the engine's description, on contiguous arrays and rows of buffers.

        Args:
            inputs: what to read.
            outputs: what to fill.
        """
        ...


class Backend(Protocol):
    """Loads engines; one object per runtime."""

    name: str

    def load(self, spec: EngineSpec, data: bytes, alone: bool = False) -> Engine:
        """Makes an engine of `data`, whose hash has been checked.

        Args:
            spec: the engine's description.
            data: the engine.
            alone: nothing runs beside this engine, so it may use all threads even where samples run in parallel.

        Raises:
            BackendError: the backend refuses the engine.
        """
        ...

    def buffer(self, shape: tuple[int, ...]) -> Buffer:
        """New memory for float32 of this shape."""
        ...

    def versions(self) -> dict[str, str]:
        """What executes, by name and version, for reports."""
        ...


_BACKENDS = {"onnxruntime": "adavit.runtime.backends.onnxruntime:OnnxRuntimeBackend"}
"""Name to the class that implements it, imported when it is asked for."""


def names() -> list[str]:
    """The backends that can be asked for."""
    return sorted(_BACKENDS)


def create_backend(name: str, options: Options) -> Backend:
    """The backend called `name`.

    Raises:
        BackendError: it is unknown or not installed.
    """
    if name not in _BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose one of {', '.join(names())}")
    module, attribute = _BACKENDS[name].split(":")
    factory: Callable[[Options], Backend] = getattr(import_module(module), attribute)
    return factory(options)
