"""TensorRT and TensorRT-RTX on NVIDIA GPUs: each engine was built from one of the bundle's graphs for batches."""

from __future__ import annotations

import logging
from collections import deque
from importlib import import_module
from typing import Any

from adavit.architecture import Architecture
from adavit.bundle.engine_set import FLAVOURS, EngineKey, Machine, numeric_version, this_platform
from adavit.bundle.engine_sets import find_engine_set, read_engine, source_of
from adavit.bundle.graph_keys import PARTS, GraphKey, constants_of, read_graph
from adavit.bundle.graphs import Graphs
from adavit.errors import BackendError, BundleError, OptionError, install_hint
from adavit.runtime.backend import Options
from adavit.runtime.backends.cuda.backend import DeviceBackend
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.captures import Captures
from adavit.runtime.backends.tensorrt.engine import Source, TensorRtEngine
from adavit.runtime.backends.tensorrt.jit import Jit

__all__ = ["TensorRtBackend", "TensorRtRtxBackend"]

log = logging.getLogger(__name__)


class TensorRtBackend(DeviceBackend):
    """Runs a set of a bundle's TensorRT engines.

    Args:
        graphs: what the engines were built from.
        options: whether to use CUDA graphs, and engines that were built elsewhere; threads only matter to who calls.

    Raises:
        BackendError: TensorRT or cuda-python is not installed, there is no GPU, or the bundle has no engines for it
            that were built here or are trusted.
    """

    name = "tensorrt"

    def __init__(self, graphs: Graphs, options: Options) -> None:
        if options.provider is not None:
            raise OptionError(f"{self.name} has no providers; leave out provider {options.provider!r}")
        self._trt = trt = import_tensorrt(self.name)
        cuda = Cuda()
        version = numeric_version(str(trt.__version__))
        self._machine = Machine(self.name, version, this_platform(), cuda.compute_capability())
        self._bundle = graphs.bundle
        self._set = find_engine_set(self._bundle, self._machine, graphs.precision, options.trust_engines)
        self._messages = Messages()
        self._logger = _logger(trt, self._messages)
        self._runtime = self._make_runtime()
        self._jit: Jit | None = None
        parts = self._set.usual(GraphKey("block", 0, PARTS[0])) in self._set.engines
        build = f"run: adavit-export {self._bundle.path} --target {self.name} --conditional"
        no_parts = None if parts else f"the engine set has no parts of blocks; {build}"
        self.usual_heads = self._usual_heads(graphs.architecture)
        super().__init__(graphs, cuda, Captures(cuda, no_parts), self._set.max_batch)
        self._finish_engines()
        self.open_engines()

    def stream(self) -> tuple[int, bool]:
        """See `DeviceBackend`: a new one."""
        flags = self.cuda.runtime.cudaStreamNonBlocking
        return int(self.cuda.call("cudaStreamCreateWithFlags", flags)), True

    def open(self, key: GraphKey, every_head: bool) -> TensorRtEngine:
        """See `DeviceBackend.open`: the bytes that are hashed are the bytes that are deserialised."""
        graph, which = read_graph(self.graphs, key), EngineKey(key) if every_head else self._set.usual(key)
        stored = self._set.engines.get(which)
        if stored is None:
            raise BundleError(f"{self._bundle.path}: {self._set.key} has no engine {key.name}; {self._rebuild()}")
        if stored.source != source_of(self.graphs.files, key):
            raise BackendError(f"engine {key.name} was built from another graph than the bundle's; {self._rebuild()}")
        engine = self._runtime.deserialize_cuda_engine(read_engine(self._bundle, stored))
        if engine is None:
            raise BackendError(f"TensorRT does not read engine {key.name}{self._messages.taken()}; {self._rebuild()}")
        constants = constants_of(self.graphs, key, graph, stored.heads)
        if self._set.stripped:
            self._refit(engine, key, graph.model(constants))
        left = graph.without(constants)
        return TensorRtEngine(engine, Source(self._trt, key.name, left, self._messages.taken, self._jit))

    def _usual_heads(self, arch: Architecture) -> tuple[tuple[int, ...], ...] | None:
        """For each block, the heads of its usual engine; None where all have all."""
        keys = [self._set.usual(GraphKey("block", block)) for block in range(arch.depth)]
        if not any(key.usual for key in keys):
            return None
        every = tuple(range(arch.heads))
        return tuple(self._set.engines[key].heads or every if key.usual else every for key in keys)

    def versions(self) -> dict[str, str]:
        """TensorRT's version, the GPU's compute capability, and the set of engines in use."""
        return {
            self.name: self._machine.version,
            "compute_capability": str(self._machine.compute_capability),
            "engine_set": self._set.key,
        }

    def _make_runtime(self) -> Any:
        """TensorRT's runtime; the lean one where the engines are of an older version."""
        runtime = self._trt.Runtime(self._logger)
        if runtime is not None and self._set.version != self._machine.version:
            runtime = runtime.load_runtime(f"libnvinfer_lean.so.{self._set.version.split('.')[0]}")
        if runtime is None:
            version, why = self._set.version, self._messages.taken()
            raise BackendError(
                f"TensorRT made no runtime for engines of {version}{why}; install tensorrt-lean=={version}, or "
                f"{self._rebuild()}"
            )
        return runtime

    def _finish_engines(self) -> None:
        """Prepares to finish engines, where they are not finished."""

    def _refit(self, engine: Any, key: GraphKey, model: bytes) -> None:
        """Puts the bundle's weights into an engine that was built without them."""
        refitter = self._trt.Refitter(engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_bytes(model) or not refitter.refit_cuda_engine():
            raise BackendError(f"engine {key.name} takes no weights{self._messages.taken()}; {self._rebuild()}")

    def _rebuild(self) -> str:
        return f"run: adavit-export {self._bundle.path} --target {self.name}"


class TensorRtRtxBackend(TensorRtBackend):
    """The same with TensorRT-RTX."""

    name = "tensorrt-rtx"

    def _finish_engines(self) -> None:
        name = f"{self._set.fingerprint[:16]}-{self._machine.version}-{self._machine.compute_capability}"
        self._jit = Jit(self._trt, name)
        self.at_close.append(self._jit.keep)


def import_tensorrt(flavour: str) -> Any:
    """The bindings of a flavour of TensorRT."""
    try:
        return import_module(FLAVOURS[flavour])
    except (ImportError, OSError) as error:
        raise BackendError(f"{flavour} is not installed ({error}); run: {install_hint(flavour)}") from None


class Messages:
    """The errors that TensorRT logs."""

    def __init__(self) -> None:
        self._kept: deque[str] = deque(maxlen=8)

    def add(self, message: str) -> None:
        """Keeps a message."""
        self._kept.append(" ".join(message.split()))

    def taken(self) -> str:
        """The messages since this was last asked for, in brackets; nothing where there are none."""
        text = " ".join(self._kept)
        self._kept.clear()
        return f" ({text[:600]})" if text else ""


def _logger(trt: Any, messages: Messages) -> Any:
    """A logger of TensorRT that keeps its errors and passes on its warnings."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.add(message)
            elif severity == trt.ILogger.WARNING:
                log.warning("TensorRT: %s", message)

    return Logger()
