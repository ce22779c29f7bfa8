"""OpenVINO on the CPU, on memory that engines share with numpy."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.errors import BackendError, one_line
from adavit.runtime.backend import Constants, Engine, Options
from adavit.runtime.backends.host import HostMoves
from adavit.runtime.bundle import Bundle, EngineSpec

try:
    import openvino
except ImportError as error:
    raise BackendError(f"OpenVINO does not import ({error}); run: pip install 'adavit[openvino]'") from None

__all__ = ["OpenVinoBackend"]

SHAPES_KEPT = 12
"""Of what OpenVINO prepares for a number of tokens, in each engine. It would keep them all: gigabytes after some dozen
images, since many of them hold weights."""
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
DECISIONS = {"tokens", "choices"}
"""Outputs that are compared with thresholds; engines that have them stay in float32."""


class OpenVinoBackend(HostMoves):
    """Runs engines in OpenVINO on the CPU.

    Args:
        bundle: where the engines are.
        options: threads, what they share, and as the provider "fp32" or "bf16": by default bf16 where the CPU
            computes in it (AMX, AVX512-BF16), else fp32. Decisions are fp32 in either.

    Raises:
        BackendError: OpenVINO is not installed, or the CPU does not compute in the precision asked for.
    """

    name = "openvino"
    fixes_inputs = False

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._bundle = bundle
        self._options = options
        self._core = openvino.Core()
        able = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._precision = options.provider or ("bf16" if able else "fp32")
        if self._precision not in PRECISIONS:
            raise BackendError(f"OpenVINO has no precision {self._precision!r} here; choose fp32 or bf16")
        if self._precision == "bf16" and not able:
            raise BackendError("this CPU does not compute in bf16 (AMX, AVX512-BF16); choose fp32")
        pool = ThreadPoolExecutor(options.threads, "adavit-compile")
        blocks = (name for name in bundle.engines if name.startswith("blocks."))
        self._compiling = {name: pool.submit(self._compile, name, options.workers) for name in blocks}
        pool.shutdown(wait=False)

    def load(self, name: str, alone: bool = False, constants: Constants | None = None) -> Engine:
        """An engine, those of blocks compiled in parallel from the start and once; see `Backend.load`."""
        try:
            if compiling := self._compiling.get(name):
                compiled = compiling.result()
            else:
                compiled = self._compile(name, 1 if alone else self._options.workers)
        except BaseException:
            for compiling in self._compiling.values():
                compiling.cancel()
            raise
        return OpenVinoEngine(compiled, self._bundle.engines[name])

    def _compile(self, name: str, streams: int) -> Any:
        """The compiled model of an engine, for so many threads that run it at once."""
        data = self._bundle.read(name)
        spec = self._bundle.engines[name]
        decides = any(tensor.name in DECISIONS for tensor in spec.outputs)
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._options.threads,
            "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": "f32" if decides else PRECISIONS[self._precision],
            "ENABLE_CPU_PINNING": False,
            "CPU_RUNTIME_CACHE_CAPACITY": SHAPES_KEPT,
        }
        if any("K" in tensor.shape for tensor in spec.inputs):
            properties["SNIPPETS_MODE"] = "DISABLE"  # fused attention stays wrong for all counts once it has seen K = 1
        try:
            return self._core.compile_model(self._core.read_model(data), "CPU", properties)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO refuses engine {name}: {one_line(error)}") from None

    def buffer(self, shape: tuple[int, ...], dtype: str = "float32") -> OpenVinoBuffer:
        """See `Backend.buffer`."""
        return OpenVinoBuffer(np.empty(shape, dtype))

    def versions(self) -> dict[str, str]:
        """OpenVINO's version and the precision in use."""
        return {"openvino": openvino.__version__, "precision": self._precision}


class Rows(NamedTuple):
    """A tensor, and the array whose memory it uses but does not keep."""

    tensor: Any
    array: npt.NDArray[Any]


def _rows(array: npt.NDArray[Any]) -> Rows:
    return Rows(openvino.Tensor(array, shared_memory=True), array)


class OpenVinoBuffer:
    """Host memory, with OpenVINO's tensors of its first rows made once."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.nbytes = array.nbytes
        self._rows: dict[int, Rows] = {}

    def rows(self, count: int) -> Rows:
        """See `Buffer.rows`."""
        found = self._rows.get(count)
        if found is None:
            found = self._rows[count] = _rows(self.array[:count])
        return found

    def part(self, position: int) -> OpenVinoBuffer:
        """See `Buffer.part`."""
        return OpenVinoBuffer(self.array[position])


class OpenVinoEngine:
    """A compiled model, with a request for every thread that runs it at once."""

    def __init__(self, compiled: Any, spec: EngineSpec) -> None:
        found = [[port.any_name for port in ports] for ports in (compiled.inputs, compiled.outputs)]
        if found != [[tensor.name for tensor in tensors] for tensors in (spec.inputs, spec.outputs)]:
            raise BackendError(f"engine {spec.name} has other inputs or outputs than config.json says; export again")
        self._name = spec.name
        self._compiled = compiled
        self._requests: list[Any] = []

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """See `Engine.run`. Requests read and write the memory that is there: nothing is copied."""
        given = [_rows(value) if isinstance(value, np.ndarray) else value for value in inputs]
        try:
            request = self._requests.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            for position, rows in enumerate(given):
                request.set_input_tensor(position, rows.tensor)
            for position, rows in enumerate(outputs):
                request.set_output_tensor(position, rows.tensor)
            request.infer(share_outputs=True)
        except RuntimeError as error:
            raise BackendError(f"engine {self._name} failed: {one_line(error)}") from error
        self._requests.append(request)
