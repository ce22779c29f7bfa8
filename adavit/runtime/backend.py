"""What the dispatcher asks of a backend on the host: slots, which hold one image each and run its blocks.

Those on a device run batches, see `adavit.runtime.batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import BlockKey
from adavit.errors import BackendError, OptionError, shown
from adavit.runtime.batch import BatchBackend

__all__ = ["Backend", "Options", "Slot", "Usage", "Use", "create_backend", "names"]

Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """How a backend is to run.

    Attributes:
        threads: CPU threads.
        provider: the backend's own name of what executes, such as ONNX Runtime's CPUExecutionProvider.
        parallel: "auto", "operators" to share the threads inside every operator, or "samples" to run an image on each
            thread.
        dispatch: how batches are driven on a GPU: "auto" or one of `adavit.runtime.batch.WAYS`.
        trust_engines: whether TensorRT engines may run that this user did not build on this machine.
        shared_pool: whether ONNX Runtime may have one thread pool for the whole process.
    """

    threads: int
    provider: str | None = None
    parallel: str = "auto"
    dispatch: str = "auto"
    trust_engines: bool = False
    shared_pool: bool = False

    def workers(self, images: int) -> int:
        """Images of a batch that run at once, each on a thread of its own; 1 where operators share the threads."""
        if self.parallel == "auto":
            return min(self.threads, images) if images > 1 and 2 * images >= self.threads else 1
        return min(self.threads, images) if self.parallel == "samples" else 1

    def threads_of(self, images: int) -> int:
        """Threads that each image of a batch runs on."""
        alone = self.parallel == "samples" or self.workers(images) > 1
        return 1 if alone else self.threads


class Use(NamedTuple):
    """What images run of a block.

    Attributes:
        threads: that run it.
        key: its sub-layers and heads.
        tokens: how many are kept.
    """

    threads: int
    key: BlockKey
    tokens: int


Usage = Mapping[Use, float]
"""How often an image has each."""


class Slot(Protocol):
    """The memory of one image on a backend, and what runs it there; for other images afterwards.

    One thread uses a slot at a time.
    """

    def stem(self, image: Float) -> None:
        """Takes an image [1, 3, S, S]: its tokens, and the first block's decisions."""
        ...

    def block(self, key: BlockKey, tokens: Index) -> None:
        """Runs a block on the kept tokens [K], ascending: its tokens, and the next block's decisions or the logits."""
        ...

    def decisions(self) -> Float:
        """The logits of the coming block's decisions, on the host [M]: tokens, heads, sub-layers."""
        ...

    def logits(self) -> Float:
        """The logits of the classes, on the host [C]."""
        ...

    def tokens(self) -> Float:
        """The tokens, on the host [N, D]."""
        ...


class Backend(Protocol):
    """Runs a bundle's graphs on the host; one object per runtime, any thread may call it.

    Attributes:
        name: as it is asked for.
        on_host: True.
    """

    name: str
    on_host: Literal[True]

    def slot(self, threads: int) -> Slot:
        """A new slot, whose image runs on so many threads."""
        ...

    def dense(self, images: Float) -> Float:
        """The logits [B, C] that the dense twin makes of images [B, 3, S, S].

        Raises:
            BundleError: there is no dense twin, or it is not the one that was exported.
        """
        ...

    def choose(self, usage: Usage) -> Sequence[Any]:
        """What to prepare for what images use most, as far as memory allows, the best first: hashable values.

        None where it is no faster.
        """
        ...

    def prepare(self, wanted: Any) -> None:
        """Prepares one of what `choose` returned; slots use it from the next block on."""
        ...

    def retain(self, wanted: Sequence[Any]) -> None:
        """Lets go of what is prepared but for these."""
        ...

    def prepared(self) -> Sequence[Any]:
        """What is prepared."""
        ...

    def rounded(self, tokens: int) -> int:
        """How many tokens are computed where so many are kept."""
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
    "onnxruntime": "adavit.runtime.backends.onnxruntime.backend:create",
    "openvino": "adavit.runtime.backends.openvino.backend:OpenVinoBackend",
    "tensorrt": "adavit.runtime.backends.tensorrt.backend:TensorRtBackend",
    "tensorrt-rtx": "adavit.runtime.backends.tensorrt.backend:TensorRtRtxBackend",
}
"""Name to what makes it, imported when it is asked for."""


def names() -> list[str]:
    """The backends that can be asked for."""
    return sorted(_BACKENDS)


def create_backend(name: str, graphs: Graphs, options: Options) -> Backend | BatchBackend:
    """The backend called `name`, for a bundle's graphs of a precision.

    Raises:
        BackendError: it is unknown or not installed.
        OptionError: it runs no batches on a device, or there is no such provider on any machine.
    """
    if not isinstance(name, str) or name not in _BACKENDS:
        gpu = "; for an NVIDIA GPU give `backend='onnxruntime'` and `provider='CUDAExecutionProvider'`"
        hint = gpu if isinstance(name, str) and name.lower() in ("cuda", "gpu") else ""
        raise BackendError(f"unknown backend {shown(name)}; choose one of {', '.join(names())}{hint}")
    module, attribute = _BACKENDS[name].split(":")
    factory: Callable[[Graphs, Options], Backend | BatchBackend] = getattr(import_module(module), attribute)
    made = factory(graphs, options)
    if options.dispatch != "auto" and made.on_host:
        raise OptionError(f"`dispatch` is how batches are driven on a GPU; {name} runs on the CPU here, leave it out")
    return made
