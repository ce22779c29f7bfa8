"""OpenVINO on the CPU.

A block's graph is compiled with its weights as inputs, so that one model serves all blocks of a kind. A model for every
block would have kernels and memory of its own, which are no longer in the cache when its block's turn comes.

OpenVINO prepares its operators anew for every number of tokens that it has not seen: 0.5 to 3 ms of a block that takes
0.3. So numbers of tokens are rounded up to a few. The further rows are the class token's, which come out the same every
time, and which attention takes once, by a mask.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Arrays
from adavit.bundle.keys import BlockKey, Sublayers
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError, OptionError, install_hint, one_line, raise_interrupt
from adavit.runtime.backend import Float, Index, Options, Usage
from adavit.runtime.forks import keep_in_fork, renew_in_fork
from adavit.runtime.head_cache import HeadCache

try:
    import openvino

    from adavit.runtime.backends.openvino_compiled import Compiled
    from adavit.runtime.backends.openvino_models import (
        HANDED,
        MASK,
        compute_in_bf16,
        mask_of,
        mask_scores,
        rounded,
        tensor_of,
        unfold,
    )
except ImportError as error:
    raise_interrupt(error)
    raise BackendError(f"OpenVINO does not import ({error}); run: {install_hint('openvino')}") from None

__all__ = ["OpenVinoBackend"]

PREPARED_KEPT = 512
"""Of the operators that a model prepares. With half as many, varied policies took 4 % longer, with more no less."""
HEADS = 64 << 20
"""Bytes of the weights of heads that are kept."""
MOST_BINDINGS = 1024
"""Of a slot: one for each set of heads in each block."""
OUTSIDE = -1
"""The number of requests that are of no block."""


class Executors:
    """Whether OpenVINO would compile on threads that only the parent of this process had.

    It keeps the threads of models that are gone for the next ones; in a forked child these never answer.
    """

    used = lost = False

    def after_fork(self) -> None:
        """See `renew_in_fork`."""
        self.lost = self.lost or self.used


EXECUTORS = Executors()
renew_in_fork(EXECUTORS)


class OpenVinoBackend:
    """Runs graphs in OpenVINO on the CPU.

    Args:
        graphs: what to run.
        options: threads, what they share, and as the provider "fp32" or "bf16": of fp32 graphs by default bf16 where
            the CPU computes in it (AMX, AVX512-BF16), else fp32. Decisions are fp32 in either.

    Raises:
        BackendError: OpenVINO is not installed, or the CPU does not compute in the precision asked for, or it refuses
            a graph.
        OptionError: there is no such precision.
    """

    name = "openvino"
    on_host = True

    def __init__(self, graphs: Graphs, options: Options) -> None:
        self.graphs = graphs
        self._options = options
        self._core = openvino.Core()
        keep_in_fork(self._core)
        self._bf16 = self._computes_in_bf16(options.provider)
        self._models: dict[tuple[bytes, int], Compiled] = {}
        self._blocks: dict[tuple[int, Sublayers], tuple[OnnxGraph, bytes]] = {}
        self._tensors: dict[tuple[int, str], Any] = {}
        self.heads = HeadCache(graphs, self._as_tensors, HEADS)
        self.after_fork()
        renew_in_fork(self)
        if graphs.architecture.adapts:
            self._load_blocks(options.threads_of(1))

    def _computes_in_bf16(self, provider: str | None) -> bool:
        able = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if provider not in (None, "fp32", "bf16"):
            raise OptionError(f"OpenVINO has no precision {provider!r}; choose fp32 or bf16")
        if provider == "bf16" and self.graphs.precision != "fp32":
            raise OptionError(f"OpenVINO computes {self.graphs.precision} graphs as they are; bf16 is for fp32 ones")
        if provider == "bf16" and not able:
            raise BackendError("this CPU does not compute in bf16 (AMX, AVX512-BF16); choose fp32")
        return provider == "bf16" or (provider is None and able and self.graphs.precision == "fp32")

    def _load_blocks(self, threads: int) -> None:
        """Reads every graph, and compiles what runs them on so many threads."""
        self.graphs.check_deciding()
        self._stem = self.graphs.stem()
        self.stem(threads)
        for block, files in enumerate(self.graphs.files.blocks):
            for sublayers in files:
                graph = self.graphs.block(block, sublayers)
                self._blocks[block, sublayers] = graph, graph.model({})
                self.shared(block, sublayers, threads)

    def after_fork(self) -> None:
        """Makes the lock, in a forked child anew."""
        self._lock = threading.RLock()

    def slot(self, threads: int) -> OpenVinoSlot:
        """See `Backend.slot`."""
        return OpenVinoSlot(self, threads)

    def dense(self, images: Float) -> Float:
        """See `Backend.dense`."""
        compiled = self._models.get((b"dense", self._options.threads))
        if compiled is None:
            graph = self.graphs.dense()
            compiled = self._kept(b"dense", graph, self._complete(graph), self._options.threads)
        logits = np.empty((len(images), self.graphs.architecture.classes), np.float32)
        given = {"images": np.ascontiguousarray(images), "logits": logits}
        compiled.run(OUTSIDE, [openvino.Tensor(given[name], shared_memory=True) for name in compiled.names])
        return logits

    def stem(self, threads: int) -> Compiled:
        """The model of the stem."""
        found = self._models.get((b"stem", threads))
        return found or self._kept(b"stem", self._stem, self._complete(self._stem), threads)

    def shared(self, block: int, sublayers: Sublayers, threads: int) -> Compiled:
        """The model of a block, which takes all weights as inputs, and which other blocks share."""
        graph, model = self._blocks[block, sublayers]
        return self._models.get((model, threads)) or self._kept(model, graph, model, threads)

    def weights(self, block: int, sublayers: Sublayers) -> dict[str, Any]:
        """The values of a block's own weights, by the names of its graph's inputs."""
        graph, _ = self._blocks[block, sublayers]
        named = {name: weight.tensor for name, weight in graph.weights.items() if weight.tensor}
        return {name: self._tensor(name, self.graphs.tensors.array(tensor)) for name, tensor in named.items()}

    def choose(self, usage: Usage) -> Sequence[Hashable]:
        """See `Backend.choose`."""
        return []

    def prepare(self, wanted: Hashable) -> None:
        """See `Backend.prepare`."""

    def keep(self, wanted: Sequence[Hashable]) -> None:
        """See `Backend.keep`."""

    def prepared(self) -> Sequence[Hashable]:
        """See `Backend.prepared`."""
        return []

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`."""
        return rounded(tokens, self.graphs.architecture.tokens)

    def timings(self) -> dict[str, float]:
        """See `Backend.timings`: there is nothing to tell."""
        return {}

    def versions(self) -> dict[str, str]:
        """OpenVINO's version and the precision in use."""
        return {"openvino": openvino.__version__, "precision": "bf16" if self._bf16 else "fp32"}

    def _as_tensors(self, arrays: Arrays) -> Mapping[str, Any]:
        return {name: self._tensor(name, array) for name, array in arrays.items()}

    def _tensor(self, name: str, array: npt.NDArray[Any]) -> Any:
        """An array as an input of this name; what lies in the weights' file is copied once."""
        dtype = openvino.Type.bf16 if self._bf16 and name in HANDED else None
        if array.flags.writeable:
            return tensor_of(array, dtype)
        key = array.ctypes.data, name
        found = self._tensors.get(key)
        if found is None:
            found = self._tensors.setdefault(key, tensor_of(array, dtype))
        return found

    def _complete(self, graph: OnnxGraph) -> bytes:
        """A graph with its weights: OpenVINO follows no references of models that it is given as bytes."""
        return graph.model(graph.arrays(self.graphs.tensors))

    def _kept(self, name: bytes, graph: OnnxGraph, model: bytes, threads: int) -> Compiled:
        """A model that is compiled once."""
        with self._lock:
            found = self._models.get((name, threads))
            if found is None:
                workers = self._options.threads if threads == 1 else 1
                found = Compiled(graph.name, workers, lambda: self._compile(graph, model, threads))
                self._models[name, threads] = found
        return found

    def _compile(self, graph: OnnxGraph, model: bytes, threads: int) -> Any:
        """Compiles a model to run on so many threads.

        With no stream, it runs in the thread that asks, and has no threads of its own; with one, it has two.
        """
        alone = threads == 1 or EXECUTORS.lost
        EXECUTORS.used = EXECUTORS.used or not alone
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 0 if alone else 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
            "CPU_RUNTIME_CACHE_CAPACITY": PREPARED_KEPT,
        }
        if "images" not in {value.name for value in graph.inputs}:
            properties["SNIPPETS_MODE"] = "DISABLE"  # fused attention may be wrong from the second number of tokens on
        try:
            return self._core.compile_model(self._read(graph, model), "CPU", properties)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO refuses graph {graph.name}: {one_line(error)}") from None

    def _read(self, graph: OnnxGraph, model: bytes) -> Any:
        """A model as OpenVINO's own, changed to run faster."""
        found = self._core.read_model(model)
        unfold(found)
        if "tokens" in {value.name for value in graph.inputs}:
            mask_scores(found)
        if self._bf16:
            compute_in_bf16(found)
        return found


class OpenVinoSlot:
    """An image's tokens, decisions and logits, and what runs its blocks on them; see `Slot`.

    Args:
        backend: compiles the models.
        threads: that run the image.
    """

    def __init__(self, backend: OpenVinoBackend, threads: int) -> None:
        arch = backend.graphs.architecture
        self._backend, self._threads = backend, threads
        self._tokens = np.empty((arch.tokens, arch.width), np.float32)
        self._logits = np.empty((1, arch.classes), np.float32)
        self._decisions = np.empty((1, arch.tokens + arch.heads + 2), np.float32)
        self._kept = np.zeros(arch.tokens, np.int64)
        tokens = _shared(self._tokens)
        self._memory = {"x": tokens, "y": tokens, "logits": _shared(self._logits)}
        self._counted: dict[int, Any] = {}
        self._rows: dict[int, Any] = {}
        self._bound: dict[BlockKey, tuple[Compiled, list[Any]]] = {}

    def stem(self, image: Float) -> None:
        """See `Slot.stem`."""
        compiled = self._backend.stem(self._threads)
        compiled.run(OUTSIDE, self._tensors(compiled, 0, {"images": _shared(np.ascontiguousarray(image))}))

    def block(self, key: BlockKey, tokens: Index) -> None:
        """See `Slot.block`."""
        found = self._bound.get(key)
        if found is None:
            found = self._bind(key)
        compiled, tensors = found[0], found[1].copy()
        count = len(tokens)
        rows = self._backend.rounded(count)
        for position, name in enumerate(compiled.names):
            if name == "tokens":
                self._kept[:count] = tokens
                self._kept[count:rows] = 0
                tensors[position] = self._indices(rows)
            elif name == MASK:
                tensors[position] = mask_of(count, rows)
        compiled.run(key.block, tensors)

    def decisions(self) -> Float:
        """See `Slot.decisions`."""
        return self._decisions[0]

    def logits(self) -> Float:
        """See `Slot.logits`."""
        return self._logits[0]

    def tokens(self) -> Float:
        """See `Slot.tokens`."""
        return self._tokens

    def _bind(self, key: BlockKey) -> tuple[Compiled, list[Any]]:
        """The model of a block, and the tensors that it runs on but for the kept tokens."""
        block, sublayers, _ = key
        compiled = self._backend.shared(block, sublayers, self._threads)
        given = self._backend.weights(block, sublayers) | dict(self._backend.heads.of(key))
        if len(self._bound) >= MOST_BINDINGS:
            self._bound.clear()
        self._bound[key] = compiled, self._tensors(compiled, block + 1, given)
        return self._bound[key]

    def _tensors(self, compiled: Compiled, deciding: int, given: Mapping[str, Any]) -> list[Any]:
        """What a model runs on that decides for a block; None where it is not known yet."""
        count = self._backend.graphs.decisions(deciding)
        if count and count not in self._counted:
            self._counted[count] = _shared(self._decisions[:, :count])
        memory = {**self._memory, **given, "decisions": self._counted.get(count)}
        return [memory.get(name) for name in compiled.names]

    def _indices(self, rows: int) -> Any:
        """The first kept tokens."""
        found = self._rows.get(rows)
        if found is None:
            found = self._rows[rows] = _shared(self._kept[:rows])
        return found


def _shared(array: npt.NDArray[Any]) -> Any:
    """A tensor of contiguous memory, which it does not keep."""
    return openvino.Tensor(array, shared_memory=True)
