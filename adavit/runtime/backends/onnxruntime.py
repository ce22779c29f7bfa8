"""ONNX Runtime on the CPU.

A block's graph runs with its weights as inputs, so that one session serves all blocks of a kind. What images use most
gets sessions of its own, with the weights as constants, which ONNX Runtime arranges once.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np

from adavit.architecture import Architecture
from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Arrays
from adavit.bundle.keys import BOTH, BlockKey, Sublayers
from adavit.bundle.onnx_graph import OnnxGraph, values_of
from adavit.errors import BackendError, install_hint, one_line, raise_interrupt
from adavit.macs import attention_macs, dense_macs, mlp_macs
from adavit.runtime.backend import Backend, Float, Index, Options, Usage, Use
from adavit.runtime.backends.host import Constants, HostBackend, HostSlot, Prepared, matrix_bytes
from adavit.runtime.backends.onnxruntime_attention import DOMAINS, Fused, fuse_attention
from adavit.runtime.forks import keep_in_fork
from adavit.runtime.head_cache import HeadCache
from adavit.runtime.memory import trim_heap

__all__ = [
    "GPU_PROVIDERS",
    "OnnxRuntimeBackend",
    "asked_for",
    "create",
    "import_onnxruntime",
    "require_provider",
    "share_pool",
]

log = logging.getLogger(__name__)

UNWANTED = ["MatMulAddFusion", "BiasGeluFusion"]
"""What is slower than what it replaces: a Gemm copies its bias into every row before it multiplies, and hides int8, see
below; the GELU that adds a bias takes 150 to 200 us for 197 x 1344 values, where adding it and the GELU take 140 (two
Zen 4 cores)."""
HIDING_INT8 = [*UNWANTED, "CommonSubexpressionElimination"]
"""What rearranges quantised products before ONNX Runtime sees that they are: they would run in float32."""

GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")

HEADS = 8 << 20
"""Bytes of the weights of heads that are kept."""

_pool_lock = threading.Lock()
_pool_threads: int | None = None


def asked_for(provider: str) -> str:
    """How a provider is asked for."""
    return f"`provider={provider!r}`"


CUDA = asked_for("CUDAExecutionProvider")


def import_onnxruntime() -> ModuleType:
    """Imports ONNX Runtime after checking that exactly one of its distributions is installed.

    Raises:
        BackendError: none, or more than one, since they overwrite each other's files.
    """
    found = sorted(
        {
            name
            for distribution in metadata.distributions()
            if (name := (distribution.metadata["Name"] or "").lower()) in ("onnxruntime", "onnxruntime-gpu")
        }
    )
    if len(found) > 1:
        raise BackendError(
            f"{' and '.join(found)} are both installed and overwrite each other; "
            f"run: pip uninstall -y {' '.join(found)} && {install_hint('cpu')}; for an NVIDIA GPU the extra gpu"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise_interrupt(error)
        if found:
            raise BackendError(f"{found[0]} is installed but does not import ({error}); reinstall it") from None
        raise BackendError(
            f"ONNX Runtime is not installed; run: {install_hint('cpu')}; for an NVIDIA GPU the extra gpu, and {CUDA}"
        ) from None
    return onnxruntime  # type: ignore[no-any-return]


def share_pool(ort: ModuleType, threads: int) -> None:
    """Makes one intra-op pool of `threads` for every session of the process, or keeps the one that is there.

    With a pool each, the idle threads of dozens of sessions spin against the one that works.
    """
    global _pool_threads
    with _pool_lock:
        if _pool_threads is None:
            try:
                ort.set_global_thread_pool_sizes(threads, 1)
                _pool_threads = threads
            except Exception as error:
                if "already" not in str(error):
                    raise BackendError(f"ONNX Runtime made no shared thread pool ({error})") from None
                _pool_threads = 0
                log.warning("the application has set ONNX Runtime's thread pool; using it, whatever its size")
        elif _pool_threads not in (0, threads):
            log.warning(
                "%d threads asked for, but this process's ONNX Runtime pool has %d and cannot change; using those",
                threads,
                _pool_threads,
            )


@cache
def share_memory(ort: ModuleType) -> None:
    """Makes one arena of memory for the intermediate activations of sessions that ask for it.

    With an arena each, dozens of sessions hold memory that one of them uses at a time, and that is not in the cache.
    Sessions of other code do not ask for it, and are as they were.
    """
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(where, None)
    except Exception as error:
        if "registered" not in str(error):
            raise BackendError(f"ONNX Runtime made no shared memory arena ({one_line(error)})") from None


def require_provider(session: Any, name: str, provider: str) -> None:
    """Raises BackendError where a graph's session would run on another provider than the one asked for."""
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"graph {name} would run on {session.get_providers()[0]}, not on {provider} as asked; "
            "see ONNX Runtime's log for what that provider lacks"
        )


BYTES = 192 << 20
"""Of the constants of prepared blocks, at most."""
COPIES = 1.5
"""Of the blocks' weights, at most, where that is less."""
LEAST = 2e-4
"""Share of the dense MACs that a prepared block has to save of an image's time, to be worth its memory."""
GATHERED = 0.1
"""Time of a MAC with weights that are inputs, beyond one with constants, in MACs."""
COPIED = 8
"""Time of copying one weight, in MACs: 32 (10 GB/s against 73 GMAC/s) for a set of heads in four that is new."""
CALLS = 1_000_000
"""What a block with constants spares beside, in MACs."""


def create(graphs: Graphs, options: Options) -> Backend:
    """ONNX Runtime on what the provider is for: a GPU or the CPU."""
    if options.provider in GPU_PROVIDERS:
        from adavit.runtime.backends.onnxruntime_gpu import OnnxRuntimeGpuBackend

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
        self._as_values = partial(as_values, self.ort)
        self.heads = HeadCache(graphs, self._as_values, HEADS)
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
        graph = self._blocks[block, sublayers]
        return {name: self._value(weight.tensor) for name, weight in graph.weights.items() if weight.tensor}

    def choose(self, usage: Usage) -> Sequence[Prepared]:
        """See `Backend.choose`: the blocks and heads that save most by their bytes."""
        arch, saved = self.graphs.architecture, defaultdict[Prepared, float](float)
        for use, often in usage.items():
            if use.key.heads and any(use.key.sublayers):
                saved[Prepared(use.threads, use.key)] += often * saved_macs(arch, use)
        least = LEAST * dense_macs(arch)
        sizes = {prepared: matrix_bytes(arch, prepared.key) for prepared, macs in saved.items() if macs >= least}
        every = BlockKey(0, BOTH, tuple(range(arch.heads)))
        chosen, free = [], min(BYTES, COPIES * arch.depth * matrix_bytes(arch, every))
        for prepared in sorted(sizes, key=lambda found: saved[found] / sizes[found], reverse=True):
            if sizes[prepared] <= free:
                chosen.append(prepared)
                free -= sizes[prepared]
        return chosen

    def prepare(self, wanted: Prepared) -> None:
        """See `Backend.prepare`."""
        block, sublayers, heads = wanted.key
        graph, fused = self._blocks[block, sublayers], None
        if sublayers.attention and self.graphs.precision == "fp32":
            fused = fuse_attention(graph, self.graphs.head_weights(wanted.key), len(heads))
        weights = fused.weights if fused else self.graphs.quantised_head_weights(wanted.key)
        constants = graph.arrays(self.graphs.tensors) | dict(weights)
        session = self._session(graph, constants, wanted.threads, fused)
        self.graphs.tensors.release()
        trim_heap()
        self._add(wanted, session)

    def keep(self, wanted: Sequence[Prepared]) -> None:
        """See `Backend.keep`."""
        with self._lock:
            super().keep(wanted)
            for slot in self._slots:
                slot.let_go()

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
        return self._session(graph, constants(), threads)

    def _session(
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
            options.add_external_initializers(list(values), list(self._as_values(values).values()))
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


def as_values(ort: ModuleType, arrays: Arrays) -> Mapping[str, Any]:
    """Arrays as ONNX Runtime's handles of them, in the memory where they are."""
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def saved_macs(arch: Architecture, use: Use) -> float:
    """The time, in MACs, that a block gains of having its weights as constants."""
    sublayers, count = use.key.sublayers, len(use.key.heads)
    macs = sublayers.attention * attention_macs(arch, use.tokens, count)
    macs += sublayers.mlp * mlp_macs(arch, use.tokens, count)
    copied = 0 if count == arch.heads else matrix_bytes(arch, use.key) / 4
    return CALLS + GATHERED * macs + COPIED * copied


class Bound(NamedTuple):
    """A session with what it reads and fills.

    Attributes:
        session: it.
        binding: to its values.
        takes_tokens: whether it takes the kept tokens, which change with every run.
        values: what lives as long as the binding.
    """

    session: Any
    binding: Any
    takes_tokens: bool
    values: Mapping[str, Any]


class OnnxRuntimeSlot(HostSlot):
    """An image's tokens, decisions and logits, and bindings of sessions to them; see `Slot`.

    Args:
        backend: makes the sessions.
        threads: that run the image.
    """

    def __init__(self, backend: OnnxRuntimeBackend, threads: int) -> None:
        super().__init__(backend.graphs, backend.ort.OrtValue.ortvalue_from_numpy)
        self._backend, self._threads = backend, threads
        self._blank = self._handle(np.zeros(1, np.float32))
        self._bound: dict[tuple[int, Sublayers], Bound] = {}
        self._prepared: dict[BlockKey, Bound] = {}
        self._stem = self._bind(backend.stem(threads), {}, 0)

    def stem(self, image: Float) -> None:
        """See `Slot.stem`."""
        binding = self._stem.binding
        binding.bind_ortvalue_input("images", self._handle(image))
        try:
            self._run(self._stem)
        finally:
            binding.clear_binding_inputs()  # a batch is not to live as long as the slot
        self._coming = 0

    def block(self, key: BlockKey, tokens: Index) -> None:
        """See `Slot.block`."""
        session = self._backend.constant.get(Prepared(self._threads, key))
        bound = self._shared(key) if session is None else self._constant(key, session)
        if bound.takes_tokens:
            self._kept[: len(tokens)] = tokens
            bound.binding.bind_ortvalue_input("tokens", self._indices(len(tokens)))
        if session is None:
            self._run_with_heads(bound, key)
        else:
            self._run(bound)
        self._coming = key.block + 1

    def _run_with_heads(self, bound: Bound, key: BlockKey) -> None:
        """Runs a session that takes the weights of heads."""
        lent = self._backend.heads.lend(key)
        for name, value in lent.values.items():
            bound.binding.bind_ortvalue_input(name, value)
        try:
            self._run(bound)
        finally:
            for name in lent.values:  # bindings would keep more weights than the cache does
                bound.binding.bind_ortvalue_input(name, self._blank)
            self._backend.heads.give_back(lent)

    def _shared(self, key: BlockKey) -> Bound:
        """The session that takes all weights as inputs, bound to those that all heads share."""
        name = key.block, key.sublayers
        found = self._bound.get(name)
        if found is None:
            given = self._backend.weights(*name)
            session = self._backend.shared(*name, self._threads)
            found = self._bound[name] = self._bind(session, given, key.block + 1)
        return found

    def _constant(self, key: BlockKey, session: Any) -> Bound:
        """A session with the weights of its heads as constants."""
        found = self._prepared.get(key)
        if found is None or found.session is not session:
            found = self._prepared[key] = self._bind(session, {}, key.block + 1)
        return found

    def let_go(self) -> None:
        """Drops what holds sessions that are no longer prepared; any thread may ask for it."""
        there = {prepared.key for prepared in self._backend.constant if prepared.threads == self._threads}
        self._prepared = {key: bound for key, bound in list(self._prepared.items()) if key in there}

    def _run(self, bound: Bound) -> None:
        try:
            bound.session.run_with_iobinding(bound.binding)
        except Exception as error:
            raise BackendError(f"a graph failed: {one_line(error)}") from error

    def _bind(self, session: Any, given: Mapping[str, Any], deciding: int) -> Bound:
        """Binds what a session that decides for a block takes but for images and kept tokens, and what it makes."""
        memory = self._values(given, deciding)
        binding, inputs = session.io_binding(), [value.name for value in session.get_inputs()]
        for name in inputs:
            if name in memory:
                binding.bind_ortvalue_input(name, memory[name])
        for value in session.get_outputs():
            binding.bind_ortvalue_output(value.name, memory[value.name])
        return Bound(session, binding, "tokens" in inputs, given)
