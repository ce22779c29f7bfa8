"""What the dispatcher asks of a backend: load engines, run them on buffers, and move rows between these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from adavit.errors import BackendError, OptionError, shown
from adavit.runtime.bundle import Bundle, EngineSpec

__all__ = ["Backend", "Buffer", "Constants", "Engine", "FixedEngine", "Options", "Sizes", "create_backend", "names"]

Index = npt.NDArray[np.intp]
Constants = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Options:
    """How a backend is to run.

    Attributes:
        threads: CPU threads.
        provider: the backend's own name of what executes, such as ONNX Runtime's CPUExecutionProvider.
        parallel: "operators" to share the threads inside every engine, for the lowest latency of one image;
            "samples" to run an image on each thread, for the highest throughput of batches.
        cuda_graphs: whether engines that run again with the same shapes become CUDA graphs (TensorRT).
        trust_engines: whether TensorRT engines may run that this user did not build on this machine.
    """

    threads: int
    provider: str | None = None
    parallel: str = "operators"
    cuda_graphs: bool = False
    trust_engines: bool = False

    @property
    def workers(self) -> int:
        """Images of a batch that run at once."""
        return self.threads if self.parallel == "samples" else 1


class Buffer(Protocol):
    """A backend's memory, which engines read and write where it is, prepared once for many runs."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        ...

    def rows(self, count: int) -> Any:
        """The first `count` rows, as `Engine.run` takes them."""
        ...

    def part(self, position: int) -> Buffer:
        """The element at a position of the first dimension, as a buffer of its own that shares the memory."""
        ...


class Engine(Protocol):
    """A loaded engine; safe to run from several threads at once.

    Attributes:
        spec: what it takes and fills; less, or laid out in another way, than the bundle says, where the backend wants.
    """

    spec: EngineSpec

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Runs, in the order of the engine's description.

        Args:
            inputs: what to read: rows of buffers, or contiguous arrays on the host.
            outputs: what to fill: rows of buffers.
        """
        ...


class FixedEngine(Protocol):
    """An engine some of whose inputs are constants."""

    def bound(self, values: Mapping[str, Any]) -> Callable[..., None]:
        """A run on these values, prepared once for many; one thread makes it at a time.

        It takes the weights of heads where these are no constants: what `attention_weights` fills, if attention runs,
        then the heads' numbers and what `mlp_weights` fills, if the MLP does; none in a block that keeps all heads. The
        stem's run takes the image.

        Args:
            values: what the other inputs and the outputs read and fill, by name: rows of buffers, or contiguous arrays
                on the host. There may be more. An output may be where an input is that nothing needs once it is there.
        """
        ...


class Sizes(NamedTuple):
    """What a block runs with.

    Attributes:
        block: its position.
        kind: the sub-layers that it runs: "attention", "mlp" or "both".
        tokens: how many are kept.
        heads: how many are kept.
    """

    block: int
    kind: str
    tokens: int
    heads: int


class Backend(Protocol):
    """Loads a bundle's engines and moves what they compute; one object per runtime.

    Attributes:
        name: as it is asked for.
        always_gathers: whether it runs any block in one engine, which is given its heads' weights, whatever the policy.
            Of a block, nothing else runs then but what gathers these weights; its fixed engines neither read nor leave
            norm1 of the tokens.
        on_host: whether buffers are the host's memory, so that fetching them costs nothing.
    """

    name: str
    always_gathers: bool
    on_host: bool

    @property
    def fixed(self) -> Callable[[str, Constants], FixedEngine] | None:
        """Loads the engine of a name with constants for some of its inputs; None where that is no faster.

        It raises what `load` does.
        """
        ...

    def load(self, name: str, alone: bool = False) -> Engine:
        """Loads the bundle's engine of this name.

        Args:
            name: of the engine.
            alone: nothing runs beside this engine, so it may use all threads even where samples run in parallel.

        Raises:
            BundleError: there is no such engine, or its file is not the one that was exported.
            BackendError: the backend refuses the engine.
        """
        ...

    def prepare(self, used: Mapping[Sizes, float]) -> Mapping[Sizes, float]:
        """Prepares engines for the sizes that come most often, by how often an image has them, to run them faster.

        Those that were prepared before, for others, are dropped. Returns the sizes it was done for, any of which may
        stand for further ones; none where that is no faster.
        """
        ...

    def buffer(self, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        """New memory of this shape and type, with no content yet."""
        ...

    def upload(self, array: npt.NDArray[Any]) -> Buffer:
        """New memory that holds what a host array holds."""
        ...

    def gather(self, source: Buffer, kept: Index, into: Buffer) -> None:
        """into[:K] = source[kept], rows of two matrices; kept is [K], ascending."""
        ...

    def scatter(self, rows: Buffer, kept: Index, into: Buffer) -> None:
        """into[kept] = rows[:K], rows of two matrices; kept is [K], ascending."""
        ...

    def add(self, source: Buffer, count: int, vectors: Buffer, index: int, into: Buffer) -> None:
        """into[:count] = source[:count] + vectors[index], rows of matrices."""
        ...

    def fetch(self, *buffers: Buffer) -> tuple[npt.NDArray[Any], ...]:
        """What the buffers hold, on the host, once everything that fills them is done.

        Valid until the buffers are written again.
        """
        ...

    def rounded(self, tokens: int) -> int:
        """How many tokens an engine computes where so many are kept."""
        ...

    def timings(self) -> dict[str, float]:
        """Milliseconds since the last call, by what took them; empty where the host does the work.

        On a device: "enqueue_ms" on the host, "gpu_ms" on the device by its events, "sync_ms" waiting for it.
        """
        ...

    def versions(self) -> dict[str, str]:
        """What executes, by name and version, for reports."""
        ...


_BACKENDS = {
    "onnxruntime": "adavit.runtime.backends.onnxruntime_gpu:create",
    "openvino": "adavit.runtime.backends.openvino:OpenVinoBackend",
    "tensorrt": "adavit.runtime.backends.tensorrt:TensorRtBackend",
    "tensorrt-rtx": "adavit.runtime.backends.tensorrt:TensorRtRtxBackend",
}
"""Name to what makes it, imported when it is asked for."""


def names() -> list[str]:
    """The backends that can be asked for."""
    return sorted(_BACKENDS)


def create_backend(name: str, bundle: Bundle, options: Options) -> Backend:
    """The backend called `name`, for a bundle's engines.

    Raises:
        BackendError: it is unknown or not installed.
        OptionError: it has no CUDA graphs to make, or no such provider on any machine.
    """
    if not isinstance(name, str) or name not in _BACKENDS:
        gpu = "; for an NVIDIA GPU give backend='onnxruntime' and provider='CUDAExecutionProvider'"
        hint = gpu if isinstance(name, str) and name.lower() in ("cuda", "gpu") else ""
        raise BackendError(f"unknown backend {shown(name)}; choose one of {', '.join(names())}{hint}")
    if options.cuda_graphs and not name.startswith("tensorrt"):
        raise OptionError(f"{name} has no CUDA graphs; they are for the backends tensorrt and tensorrt-rtx")
    module, attribute = _BACKENDS[name].split(":")
    factory: Callable[[Bundle, Options], Backend] = getattr(import_module(module), attribute)
    return factory(bundle, options)
