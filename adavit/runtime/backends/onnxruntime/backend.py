"""ONNX Runtime on the CPU.

A block's graph runs with its weights as inputs, so that one session serves all blocks of a kind; those of kept heads it
gathers. What images use most gets sessions of its own, with the weights as constants, which ONNX Runtime arranges once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import numpy as np

from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import BlockKey, Sublayers
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.bundle.onnx_write import values_of
from adavit.errors import BackendError, one_line
from adavit.runtime.backend import Backend, Float, Options, Usage
from adavit.runtime.backends.host import Constants, HostBackend, Prepared
from adavit.runtime.backends.onnxruntime.attention import DOMAINS, Fused, fuse_attention
from adavit.runtime.backends.onnxruntime.choice import most_saving
from adavit.runtime.backends.onnxruntime.gather import gather_heads
from adavit.runtime.backends.onnxruntime.process import (
    CUDA,
    GPU_PROVIDERS,
    import_onnxruntime,
    require_provider,
    share_memory,
    share_pool,
)
from adavit.runtime.backends.onnxruntime.slot import OnnxRuntimeSlot
from adavit.runtime.batch import BatchBackend
from adavit.runtime.forks import keep_in_fork
from adavit.runtime.memory import trim_heap

__all__ = ["OnnxRuntimeBackend", "create"]

log = logging.getLogger(__name__)

UNWANTED = ["MatMulAddFusion", "BiasGeluFusion"]
"""What is slower than what it replaces: a Gemm copies its bias into every row before it multiplies, and hides int8, see
below; the GELU that adds a bias takes 150 to 200 us for 197 x 1344 values, where adding it and the GELU take 140 (two
Zen 4 cores)."""
HIDING_INT8 = [*UNWANTED, "CommonSubexpressionElimination"]
"""What rearranges quantised products before ONNX Runtime sees that they are: they would run in float32."""


def create(graphs: Graphs, options: Options) -> Backend | BatchBackend:
    """ONNX Runtime on what the provider is for: a GPU or the CPU."""
    if options.provider in GPU_PROVIDERS:
        from adavit.runtime.backends.onnxruntime.gpu import OnnxRuntimeGpuBackend

        return OnnxRuntimeGpuBackend(graphs, options)
    return OnnxRuntimeBackend(graphs, options)


class OnnxRuntimeBackend(HostBackend[Any]):
    """Runs graphs in ONNX Runtime on numpy arrays.

    Every session has a pool of its own, whose threads stop to spin when it has run, and the process is left as it was.
    With `shared_pool`, sessions share ONNX Runtime's pool of the process; from then on, nobody in the process can make
    a session with a pool of its own.

    Args:
        graphs: what to run.
        options: threads, the provider, by default CPUExecutionProvider, and whether to share a pool.

    Raises:
        BackendError: ONNX Runtime is not installed, or lacks the provider, or refuses a graph.
    """

    name = "onnxruntime"

    def __init__(self, graphs: Graphs, options: Options) -> None:
        self.ort = import_onnxruntime()
        super().__init__(graphs, options)
        self._provider = options.provider or "CPUExecutionProvider"
        available = self.ort.get_available_providers()
        if self._provider not in available:
            raise BackendError(
                f"ONNX Runtime has no provider {self._provider!r} here; it has {', '.join(available)}; "
                f"for an NVIDIA GPU give {CUDA}"
            )
        self._shares_pool = options.shared_pool and options.threads > 1
        if self._shares_pool:
            share_pool(self.ort, options.threads)
        share_memory(self.ort)
        self._values: dict[str, Any] = {}
        self._slots: WeakSet[OnnxRuntimeSlot] = WeakSet()
        self._heads: dict[tuple[int, ...], Any] = {}
        if graphs.architecture.adapts:
            self._load_blocks(options.threads_of(1))
        else:
            self._dense()

    def slot(self, threads: int) -> OnnxRuntimeSlot:
        """See `Backend.slot`."""
        slot = OnnxRuntimeSlot(self, threads)
        with self._lock:
            self._slots.add(slot)
        return slot

    def dense(self, images: Float) -> Float:
        """See `Backend.dense`."""
        session = self._dense()
        try:
            logits: Float = session.run(["logits"], {"images": images})[0]
        except Exception as error:
            raise BackendError(f"the dense twin failed: {one_line(error)}") from error
        return logits

    def weights(self, block: int, sublayers: Sublayers) -> dict[str, Any]:
        """The values of a block's own weights, by the names of its graph's inputs."""
        graph, _ = self._shared[block, sublayers]
        return {name: self._value(weight.tensor) for name, weight in graph.weights.items() if weight.tensor}

    def heads(self, key: BlockKey) -> Any:
        """The numbers of a key's heads, as a value."""
        found = self._heads.get(key.heads)
        if found is None:
            numbers = np.array(key.heads, np.int64)
            found = self._heads[key.heads] = self.ort.OrtValue.ortvalue_from_numpy(numbers)
        return found

    def _to_share(self, graph: OnnxGraph, block: int) -> OnnxGraph:
        return gather_heads(graph, self.graphs.architecture, self.graphs.tensors, block)

    def choose(self, usage: Usage) -> Sequence[Prepared]:
        """See `Backend.choose`."""
        return most_saving(self.graphs.architecture, usage)

    def prepare(self, wanted: Prepared) -> None:
        """See `Backend.prepare`."""
        block, sublayers, heads = wanted.key
        graph, fused = self._blocks[block, sublayers], None
        if sublayers.attention and self.graphs.precision == "fp32":
            fused = fuse_attention(graph, self.graphs.head_weights(wanted.key), len(heads))
        weights = fused.weights if fused else self.graphs.quantised_head_weights(wanted.key)
        constants = graph.arrays(self.graphs.tensors) | dict(weights)
        session = self.session(graph, constants, wanted.threads, fused)
        self.graphs.tensors.release()
        trim_heap()
        self._add(wanted, session)

    def retain(self, wanted: Sequence[Prepared]) -> None:
        """See `Backend.retain`."""
        with self._lock:
            super().retain(wanted)
            for slot in self._slots:
                slot.drop_unprepared()

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`: as many."""
        return tokens

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version and the provider in use."""
        return {"onnxruntime": self.ort.__version__, "provider": self._provider}

    def _value(self, tensor: str) -> Any:
        """A weight as ONNX Runtime's handle of it: in the memory where it is."""
        found = self._values.get(tensor)
        if found is None:
            found = self._values[tensor] = self.ort.OrtValue.ortvalue_from_numpy(self.graphs.tensors.array(tensor))
        return found

    def _make(self, graph: OnnxGraph, constants: Callable[[], Constants], threads: int) -> Any:
        return self.session(graph, constants(), threads)

    def session(
        self,
        graph: OnnxGraph,
        constants: Constants,
        threads: int,
        fused: Fused | None = None,
    ) -> Any:
        """A session on so many threads, of the process's pool where that is set."""
        if not self._shares_pool:
            try:
                return self._session_on(graph, constants, threads, fused)
            except BackendError as error:
                if "global thread pool" not in str(error):
                    raise
                log.warning("this process has set ONNX Runtime's thread pool: sessions share its threads")
                self._shares_pool = True
        return self._session_on(graph, constants, None, fused)

    def _session_on(
        self,
        graph: OnnxGraph,
        constants: Constants,
        threads: int | None,
        fused: Fused | None,
    ) -> Any:
        """A session with a pool of its own of some threads, or on the process's pool."""
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_env_allocators", "1")
        if threads is None:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.force_spinning_stop", "1")
        values = values_of(constants)
        if values:
            options.add_external_initializers(
                list(values), [self.ort.OrtValue.ortvalue_from_numpy(array) for array in values.values()]
            )
        if fused is None:
            model = graph.model(constants, external=True)
        else:
            model = graph.model(constants, True, fused.nodes, fused.added, DOMAINS)
        unwanted = HIDING_INT8 if self.graphs.precision in ("int8", "mixed") else UNWANTED
        try:
            session = self.ort.InferenceSession(
                model,
                options,
                providers=[self._provider],
                enable_fallback=0,
                disabled_optimizers=unwanted,
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses graph {graph.name}: {one_line(error)}") from None
        session._model_bytes = None  # kept for a fallback to other providers, which is off
        require_provider(session, graph.name, self._provider)
        keep_in_fork(session)
        return session
