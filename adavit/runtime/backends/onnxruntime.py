"""ONNX Runtime, with one thread pool for all engines of the process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.errors import BackendError, install_hint, one_line, raise_interrupt
from adavit.runtime.backend import Constants, Options
from adavit.runtime.backends.host import HostMoves
from adavit.runtime.bundle import Bundle, EngineSpec
from adavit.runtime.forks import keep_in_fork
from adavit.runtime.onnx_file import with_fixed_inputs

__all__ = ["OnnxRuntimeBackend"]

log = logging.getLogger(__name__)

UNWANTED = ["MatMulAddFusion", "BiasGeluFusion"]
"""What is slower than what it replaces: a Gemm copies its bias into every row before it multiplies, and hides int8, see
below; the GELU that adds a bias takes 150 to 200 us for 197 x 1344 values, where adding it and the GELU take 140 (two
Zen 4 cores)."""
HIDING_INT8 = [*UNWANTED, "CommonSubexpressionElimination"]
"""What rearranges quantised products before ONNX Runtime sees that they are: they would run in float32."""

TOKENS = {"x", "normed", "channels"}
"""Inputs that are rows of the same few buffers in every run."""
MOST_BINDINGS = 1024
"""Of an engine: for each number of tokens and pair of buffers one, of 1 KB or less beside the buffers, which last."""

_pool_lock = threading.Lock()
_pool_threads: int | None = None


def asked_for(provider: str) -> str:
    """How a provider is asked for, from Python and on the command line."""
    return f"provider={provider!r} (adavit-run --provider {provider})"


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
    """Makes one arena of memory for what engines compute in between.

    With an arena each, dozens of sessions hold memory that one of them uses at a time, and that is not in the cache.
    """
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(where, None)


def require_provider(session: Any, spec: EngineSpec, provider: str) -> None:
    """Raises BackendError where an engine's session would run on another provider than the one asked for."""
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"engine {spec.name} would run on {session.get_providers()[0]}, not on {provider} as asked; "
            "see ONNX Runtime's log for what that provider lacks"
        )


class OnnxRuntimeBackend(HostMoves):
    """Runs engines in ONNX Runtime on numpy arrays.

    To share the threads inside every engine, all sessions use ONNX Runtime's pool of the process: with a pool
    each, the idle threads of dozens of sessions spin against the one that works. From then on, ONNX Runtime
    lets nobody in the process make a session with a pool of its own (`use_per_session_threads`). To run samples
    in parallel, sessions have no pool, and the process is left as it was.

    Args:
        bundle: where the engines are.
        options: threads (of the shared pool, the first to ask decides), what they share, and the provider, by
            default CPUExecutionProvider.

    Raises:
        BackendError: ONNX Runtime is not installed, or lacks the provider.
    """

    name = "onnxruntime"
    always_gathers = False

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._bundle = bundle
        self._ort = import_onnxruntime()
        self._threads = options.threads
        self._provider = options.provider or "CPUExecutionProvider"
        available = self._ort.get_available_providers()
        if self._provider not in available:
            raise BackendError(
                f"ONNX Runtime has no provider {self._provider!r} here; it has {', '.join(available)}; "
                f"for an NVIDIA GPU give {CUDA}"
            )
        share_memory(self._ort)
        self._shares_pool = options.parallel == "operators"
        if self._shares_pool:
            share_pool(self._ort, options.threads)

    def load(self, name: str, alone: bool = False) -> OnnxRuntimeEngine:
        """Creates a session; see `Backend.load`."""
        spec = self._bundle.engine(name)
        return OnnxRuntimeEngine(self._ort, self._session(spec, self._bundle.read(name), alone), spec)

    def fixed(self, name: str, constants: Constants) -> OnnxRuntimeFixedEngine:
        """Creates a session; see `Backend.fixed`."""
        spec, attributes = self._bundle.engine(name).without(constants), {}
        if "qkv" in constants:  # the node `attention` knows neither its heads nor their channels
            channels = constants["qkv"].shape[1] // 3
            heads = channels // self._bundle.architecture.head_width
            attributes = {"attention": {"num_heads": heads, "qkv_hidden_sizes": [channels] * 3}}
        session = self._session(spec, with_fixed_inputs(self._bundle.read(name), constants, attributes), alone=False)
        return OnnxRuntimeFixedEngine(self._ort, session, spec)

    def _session(self, spec: EngineSpec, data: bytes, alone: bool) -> Any:
        """A session that shares threads with others as this backend's do."""
        if not self._shares_pool:
            try:
                return self._session_on(spec, data, self._threads if alone else 1)
            except BackendError as error:
                if "global thread pool" not in str(error):
                    raise
                log.warning("this process has set ONNX Runtime's thread pool, so that engines share its threads")
                self._shares_pool = True
        return self._session_on(spec, data, None)

    def _unwanted(self, spec: EngineSpec) -> list[str]:
        """The optimizers that an engine is better off without."""
        return HIDING_INT8 if self._bundle.config["engines"][spec.name].get("precision") == "int8" else UNWANTED

    def _session_on(self, spec: EngineSpec, data: bytes, threads: int | None) -> Any:
        """A session with a pool of its own of some `threads`, or on the process's pool."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_env_allocators", "1")
        if threads is None:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = self._ort.InferenceSession(
                data, options, providers=[self._provider], enable_fallback=0, disabled_optimizers=self._unwanted(spec)
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses engine {spec.name}: {one_line(error)}") from None
        session._model_bytes = (
            None  # kept for a fallback to other providers, which is off: as much again as the weights
        )
        require_provider(session, spec, self._provider)
        inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (spec.inputs, spec.outputs))
        if ([t.name for t in session.get_inputs()], [t.name for t in session.get_outputs()]) != (inputs, outputs):
            raise BackendError(f"engine {spec.name} has other inputs or outputs than config.json says; export again")
        return session

    def buffer(self, shape: tuple[int, ...], dtype: str = "float32") -> OnnxRuntimeBuffer:
        """See `Backend.buffer`."""
        return OnnxRuntimeBuffer(self._ort, np.empty(shape, dtype))

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version and the provider in use."""
        return {"onnxruntime": self._ort.__version__, "provider": self._provider}


class OnnxRuntimeBuffer:
    """Host memory, with ONNX Runtime's handles of its first rows made once: making one costs more than binding it."""

    def __init__(self, ort: ModuleType, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.nbytes = array.nbytes
        self._ort = ort
        self._values: dict[int, Any] = {}

    def rows(self, count: int) -> Any:
        """See `Buffer.rows`."""
        value = self._values.get(count)
        if value is None:
            value = self._values[count] = _as_value(self._ort, self.array[:count])
        return value

    def part(self, position: int) -> OnnxRuntimeBuffer:
        """See `Buffer.part`."""
        return OnnxRuntimeBuffer(self._ort, self.array[position])


def _as_value(ort: ModuleType, value: Any) -> Any:
    """An array as ONNX Runtime's handle of it: on the CPU the array itself, not a copy."""
    return ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value


class OnnxRuntimeEngine:
    """One session."""

    def __init__(self, ort: ModuleType, session: Any, spec: EngineSpec) -> None:
        self.spec = spec
        self._names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        self._session = session
        self._ort = ort
        self._bindings: dict[Any, tuple[Any, list[Any]]] = {}
        self._takes_tokens = {tensor.name for tensor in spec.inputs} <= TOKENS
        self._keeps = not spec.name.endswith("_weights")  # what these fill is new every time
        keep_in_fork(self)

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """See `Engine.run`. Everything is bound where it is: nothing is copied or allocated.

        A binding is used again, by one thread at a time. Engines that take rows of tokens alone get and fill the same
        few buffers, and keep a binding for each number of rows; else what differs from the last run is bound anew.
        """
        values = [*inputs, *outputs]
        lasting = self._takes_tokens and not any(isinstance(value, np.ndarray) for value in values)
        key = tuple(map(id, values)) if lasting else None
        bound = self._bindings.pop(key, None)
        binding, before = bound or (self._session.io_binding(), [None] * len(values))
        if bound is None or key is None:
            self._bind(binding, before, values, len(inputs))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"engine {self.spec.name} failed: {one_line(error)}") from error
        if self._keeps:
            if len(self._bindings) >= MOST_BINDINGS:
                self._bindings.clear()
            self._bindings[key] = binding, values

    def _bind(self, binding: Any, before: list[Any], values: list[Any], inputs: int) -> None:
        """Binds the values that differ from those before."""
        for position, (name, value, bound) in enumerate(zip(self._names, values, before, strict=True)):
            if value is not bound:
                bind = binding.bind_ortvalue_input if position < inputs else binding.bind_ortvalue_output
                bind(name, _as_value(self._ort, value))


class OnnxRuntimeFixedEngine:
    """One session, some inputs of whose model are constants."""

    def __init__(self, ort: ModuleType, session: Any, spec: EngineSpec) -> None:
        self._ort, self._session, self._spec = ort, session, spec
        self._given = [tensor.name for tensor in spec.inputs if tensor.name == "images"]
        self._blank = _as_value(ort, np.zeros(1, np.float32))
        keep_in_fork(self)

    def bound(self, values: Mapping[str, Any]) -> Callable[..., None]:
        """See `FixedEngine.bound`."""
        binding, given = self._session.io_binding(), self._given
        try:
            for tensor in self._spec.inputs:
                if tensor.name not in given:
                    binding.bind_ortvalue_input(tensor.name, _as_value(self._ort, values[tensor.name]))
            for tensor in self._spec.outputs:
                binding.bind_ortvalue_output(tensor.name, _as_value(self._ort, values[tensor.name]))
        except KeyError as error:
            raise BackendError(f"engine {self._spec.name} takes {error}, which is unknown; export again") from None
        call = self._session.run_with_iobinding

        def run(*arrays: Any) -> None:
            for name, array in zip(given, arrays, strict=True):
                binding.bind_ortvalue_input(name, _as_value(self._ort, array))
            try:
                call(binding)
            except Exception as error:
                raise BackendError(f"engine {self._spec.name} failed: {one_line(error)}") from error
            finally:
                for name in given:  # a batch is not to live as long as the binding
                    binding.bind_ortvalue_input(name, self._blank)

        return run
