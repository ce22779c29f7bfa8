"""TensorRT and TensorRT-RTX on NVIDIA GPUs: activations stay on the device, decisions alone come back.

All engines run on one stream and share one scratch memory. Rows are moved by the bundle's engines `rows.*`.
"""

from __future__ import annotations

import logging
from collections import deque
from importlib import import_module
from typing import Any

from adavit.errors import BackendError, BundleError, OptionError, install_hint
from adavit.runtime.backend import Options
from adavit.runtime.backends.cuda import Cuda
from adavit.runtime.backends.device import Device
from adavit.runtime.backends.device_moves import DeviceMoves
from adavit.runtime.backends.tensorrt_engine import TensorRtEngine
from adavit.bundle.bundle import Bundle, EngineSpec
from adavit.runtime.engine_sets import FLAVOURS, Machine, find_engine_set, numeric_version, this_platform

__all__ = ["TensorRtBackend", "TensorRtRtxBackend"]

log = logging.getLogger(__name__)


class TensorRtBackend(DeviceMoves):
    """Runs a set of a bundle's TensorRT engines.

    Args:
        bundle: where the engines are.
        options: whether to use CUDA graphs, and engines that were built elsewhere; threads only matter to who calls.

    Raises:
        BackendError: TensorRT or cuda-python is not installed, there is no GPU, or the bundle has no engines for it
            that were built here or are trusted.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, options: Options) -> None:
        if options.provider is not None:
            raise OptionError(f"{self.name} has no providers; leave out provider {options.provider!r}")
        self._bundle = bundle
        self._trt = trt = import_tensorrt(self.name)
        cuda = Cuda()
        version = numeric_version(str(trt.__version__))
        self._machine = Machine(self.name, version, this_platform(), cuda.compute_capability())
        self._set = find_engine_set(bundle, self._machine, options.trust_engines)
        self._graphs = options.cuda_graphs
        self._messages = Messages()
        self._logger = _logger(trt, self._messages)
        self._runtime = self._make_runtime()
        super().__init__(Device(cuda))

    def load(self, name: str, alone: bool = False) -> TensorRtEngine:
        """See `Backend.load`: the bytes that are hashed are the bytes that are deserialised."""
        stored = self._set.engines.get(name)
        if stored is None or name not in self._bundle.engines:
            raise BundleError(f"{self._bundle.path}: {self._set.key} has no engine {name!r}; {self._rebuild()}")
        spec = self._bundle.engines[name]
        if stored.source != spec.sha256:
            raise BackendError(f"engine {name} was built from another graph than the bundle's; {self._rebuild()}")
        engine = self._runtime.deserialize_cuda_engine(self._bundle.read_stored(stored))
        if engine is None:
            raise BackendError(f"TensorRT does not read engine {name}{self._messages.taken()}; {self._rebuild()}")
        if self._set.stripped:
            self._refit(engine, spec)
        loaded = TensorRtEngine(self._device, self._trt, engine, spec, self._graphs, self._messages.taken)
        self._engines.append(loaded)
        return loaded

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

    def _refit(self, engine: Any, spec: EngineSpec) -> None:
        """Puts the weights of the ONNX file into an engine that was built without them."""
        refitter = self._trt.Refitter(engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_bytes(self._bundle.read(spec.name)) or not refitter.refit_cuda_engine():
            raise BackendError(f"engine {spec.name} takes no weights{self._messages.taken()}; {self._rebuild()}")

    def _rebuild(self) -> str:
        return f"run: adavit-export {self._bundle.path} --target {self.name}"


class TensorRtRtxBackend(TensorRtBackend):
    """The same with TensorRT-RTX."""

    name = "tensorrt-rtx"


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
