"""How TensorRT-RTX finishes engines on the GPU that runs them, and where it keeps what it compiled.

Kernels are compiled for the shapes that come, before a run, and kept in the user's cache folder. A cache is native
code: one that others may have written is not read.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from adavit.bundle.trust import private
from adavit.errors import one_line
from adavit.files import write_beside
from adavit.reading import open_regular
from adavit.user_folder import user_folder

__all__ = ["Jit"]

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 30


class Jit:
    """Makes execution contexts of TensorRT-RTX engines.

    Args:
        trt: the bindings.
        name: of the cache: what is compiled depends on the engine set, TensorRT's version and the GPU.
    """

    def __init__(self, trt: Any, name: str) -> None:
        self._trt = trt
        folder = user_folder("XDG_CACHE_HOME", ".cache")
        self._path: Path | None = folder and folder / f"rtx-{name}.cache"
        self._cache: Any = None
        self._kept = b""

    def context(self, engine: Any) -> Any:
        """An execution context whose memory is handed to it, and which records no CUDA graphs of its own."""
        trt, config = self._trt, engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read()
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def _read(self) -> None:
        path = self._path
        if path is None or not private(path):
            return
        try:
            with open_regular(path) as file:
                self._kept = file.read(MOST_BYTES + 1)
            if len(self._kept) > MOST_BYTES or not self._cache.deserialize(self._kept):
                log.warning("%s is of no use; it is replaced", path)
        except OSError as error:
            log.warning("%s cannot be read (%s); kernels are compiled again", path, one_line(error))

    def keep(self) -> None:
        """Writes what was compiled since it was read; a warning says where that is not possible."""
        if self._cache is None or self._path is None:
            return
        data = bytes(self._cache.serialize())
        if data == self._kept:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with write_beside(self._path) as file:
                file.write(data)
            self._kept = data
        except (OSError, ValueError) as error:
            log.warning("%s cannot be written (%s); kernels will be compiled again", self._path, one_line(error))
