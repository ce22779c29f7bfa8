"""TensorRT and TensorRT-RTX on NVIDIA GPUs: activations stay on the device, decisions alone come back.

All engines run on one stream and share one scratch memory. Rows are moved by the bundle's engines `rows.*`.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.errors import BackendError, BundleError
from adavit.runtime.backend import Index, Options
from adavit.runtime.backends.cuda import Cuda
from adavit.runtime.backends.device import ALIGNMENT, Block, Device, size_of
from adavit.runtime.backends.tensorrt_engine import Rows, TensorRtEngine
from adavit.runtime.bundle import Bundle, EngineSpec
from adavit.runtime.engine_sets import FLAVOURS, Machine, find_engine_set, this_platform

__all__ = ["TensorRtBackend", "TensorRtRtxBackend"]

log = logging.getLogger(__name__)


class TensorRtBackend:
    """Runs a set of a bundle's TensorRT engines.

    Args:
        bundle: where the engines are.
        options: whether to use CUDA graphs; threads only matter to who calls.

    Raises:
        BackendError: TensorRT or cuda-python is not installed, there is no GPU, or the bundle has no engines for it.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, options: Options) -> None:
        if options.provider is not None:
            raise BackendError(f"{self.name} has no providers; leave out provider {options.provider!r}")
        self._bundle = bundle
        self._trt = trt = import_tensorrt(self.name)
        cuda = Cuda()
        self._machine = Machine(self.name, str(trt.__version__), this_platform(), cuda.compute_capability())
        self._set = find_engine_set(bundle, self._machine)
        self._graphs = options.cuda_graphs
        self._messages = Messages()
        self._logger = _logger(trt, self._messages)
        self._runtime = self._make_runtime()
        self._device = device = Device(cuda)
        self._engines: list[TensorRtEngine] = []
        self._moves: dict[str, TensorRtEngine] = {}
        self._temporaries: dict[tuple[Any, ...], DeviceBuffer] = {}
        self._close = weakref.finalize(self, _close, device, self._engines)

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

    def buffer(self, shape: tuple[int, ...], dtype: str = "float32") -> DeviceBuffer:
        """See `Backend.buffer`."""
        return DeviceBuffer(self._device, shape, dtype)

    def gather(self, source: DeviceBuffer, kept: Index, into: DeviceBuffer, at: int = 0) -> None:
        """See `Backend.gather`."""
        with self._device.lock:
            target = into.span(at, len(kept))
            if len(kept) == 1:
                self._copy(source.span(int(kept[0]), 1), target)
            elif target.address % ALIGNMENT:
                rows = self._temporary("gathered", source.shape, source.dtype).rows(len(kept))
                self._move("gather", [source.rows(len(source)), kept], rows)
                self._copy(rows, target)
            else:
                self._move("gather", [source.rows(len(source)), kept], target)

    def scatter(self, rows: DeviceBuffer, kept: Index, into: DeviceBuffer) -> None:
        """See `Backend.scatter`. TensorRT does not promise to work in place, so the result is copied back."""
        with self._device.lock:
            scattered = self._temporary("scattered", into.shape, into.dtype).rows(len(into))
            whole = into.rows(len(into))
            self._move("scatter", [whole, rows.rows(len(kept)), kept], scattered)
            self._copy(scattered, whole)

    def add(self, source: DeviceBuffer, count: int, vectors: DeviceBuffer, index: int, into: DeviceBuffer) -> None:
        """See `Backend.add`."""
        inputs = [source.rows(count), vectors.rows(len(vectors)), np.asarray([index], np.int64)]
        self._move("add", inputs, into.rows(count))

    def fetch(self, *buffers: DeviceBuffer) -> tuple[npt.NDArray[Any], ...]:
        """See `Backend.fetch`; bfloat16 comes as float32."""
        blocks = self._device.fetch([(buffer.address, buffer.nbytes) for buffer in buffers])
        return tuple(
            _decoded(block.as_array(buffer.shape, buffer.dtype), buffer.dtype)
            for block, buffer in zip(blocks, buffers, strict=True)
        )

    def timings(self) -> dict[str, float]:
        """See `Backend.timings`."""
        return self._device.timings()

    def versions(self) -> dict[str, str]:
        """TensorRT's version, the GPU's compute capability, and the set of engines in use."""
        return {
            self.name: self._machine.version,
            "compute_capability": str(self._machine.compute_capability),
            "engine_set": self._set.key,
        }

    def _move(self, name: str, inputs: list[Any], output: Rows) -> None:
        engine = self._moves.get(name)
        if engine is None:
            engine = self._moves[name] = self.load(f"rows.{name}")
        engine.run(inputs, [output])

    def _copy(self, source: Rows, target: Rows) -> None:
        self._device.begin()
        self._device.copy(target.address, source.address, size_of(source.shape, source.dtype), "DeviceToDevice")

    def _temporary(self, use: str, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        """A buffer for what is on its way, one for all threads: what is enqueued later overwrites it later."""
        key = use, shape, dtype
        if key not in self._temporaries:
            self._temporaries[key] = self.buffer(shape, dtype)
        return self._temporaries[key]

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


class DeviceBuffer:
    """Memory on the GPU.

    Attributes:
        address: of its first byte.
        shape, dtype: of what it holds.
        nbytes: its size.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str, block: Block | None = None) -> None:
        self._device = device
        self._block = block or device.memory.take(size_of(shape, dtype))
        self.address = self._block.address
        self.shape, self.dtype = shape, dtype
        self.nbytes = size_of(shape, dtype)
        self._rows: dict[int, Rows] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, count: int) -> Rows:
        """See `Buffer.rows`."""
        found = self._rows.get(count)
        if found is None:
            found = self._rows[count] = self.span(0, count)
        return found

    def span(self, start: int, count: int) -> Rows:
        """`count` rows from one on."""
        stride = self.nbytes // self.shape[0]
        return Rows(self._block, self.address + start * stride, (count, *self.shape[1:]), self.dtype)

    def part(self, position: int) -> DeviceBuffer:
        """See `Buffer.part`; a copy where TensorRT would not take the element's address."""
        rows = self.span(position, 1)
        if rows.address % ALIGNMENT:
            part = DeviceBuffer(self._device, self.shape[1:], self.dtype)
            with self._device.lock:
                self._device.copy(part.address, rows.address, part.nbytes, "DeviceToDevice")
        else:
            part = DeviceBuffer(self._device, self.shape[1:], self.dtype, self._block)
            part.address = rows.address
        return part


def _close(device: Device, engines: list[TensorRtEngine]) -> None:
    """Frees engines and contexts, then what they ran on."""
    with device.lock:
        device.synchronise()
        for engine in engines:
            engine.close()
        engines.clear()
        device.close()


def _decoded(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """What numpy can compute with: a bfloat16 is the upper half of a float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else values


def import_tensorrt(flavour: str) -> Any:
    """The bindings of a flavour of TensorRT."""
    try:
        return import_module(FLAVOURS[flavour])
    except (ImportError, OSError) as error:
        raise BackendError(f"{flavour} is not installed ({error}); run: pip install 'adavit[{flavour}]'") from None


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
