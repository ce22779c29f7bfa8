"""ONNX Runtime in this process: its import, its one thread pool, its one arena, its providers."""

from __future__ import annotations

import logging
import threading
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any

from adavit.errors import BackendError, install_hint, one_line, raise_interrupt

__all__ = ["CUDA", "GPU_PROVIDERS", "asked_for", "import_onnxruntime", "require_provider", "share_memory", "share_pool"]

log = logging.getLogger(__name__)

GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")

_pool_lock = threading.Lock()
_pool_threads: int | None = None


def asked_for(provider: str) -> str:
    """How a provider is asked for, from Python and on the command line."""
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
