"""OpenVINO on the CPU, on memory that engines share with numpy.

OpenVINO prepares its operators anew for every number of tokens that it has not seen: 0.5 to 3 ms of an engine that
takes 0.3. So numbers of tokens are rounded up to a few, and attention masks the rows behind the kept ones: its softmax
makes exact zeros of them. Rows of the other parts do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from adavit.bundle.bundle import Bundle
from adavit.errors import BackendError, OptionError, install_hint, one_line, raise_interrupt
from adavit.runtime.backend import Engine, Options, Sizes
from adavit.runtime.backends.host import HostMoves
from adavit.runtime.forks import keep_in_fork, renew_in_fork

try:
    import openvino

    from adavit.runtime.backends.openvino_blocks import Blocks
    from adavit.runtime.backends.openvino_buffers import OpenVinoBuffer, rounded
    from adavit.runtime.backends.openvino_engine import Compiled, OpenVinoEngine
    from adavit.runtime.backends.openvino_models import mask_scores
    from adavit.runtime.backends.openvino_stem import restructure
except ImportError as error:
    raise_interrupt(error)
    raise BackendError(f"OpenVINO does not import ({error}); run: {install_hint('openvino')}") from None

__all__ = ["OpenVinoBackend"]

PREPARED_KEPT = 512
"""Of the operators that a model prepares. With half as many, varied policies took 4 % longer, with more no less."""
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
BY_IMAGE = {"stem", "head"}
"""Engines that run for one image at a time: of a fixed shape, they take a tenth to a fifth less time."""
WITH_STEM = {"stem", "dense"}
"""Engines that a stem is part of."""
DECISIONS = {"tokens", "choices"}
"""Outputs that are compared with thresholds; engines that have them stay in float32."""


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

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._bundle = bundle
        self._options = options
        self._core = openvino.Core()
        keep_in_fork(self)
        able = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._precision = options.provider or ("bf16" if able else "fp32")
        if self._precision not in PRECISIONS:
            raise OptionError(f"OpenVINO has no precision {self._precision!r}; choose fp32 or bf16")
        if self._precision == "bf16" and not able:
            raise BackendError("this CPU does not compute in bf16 (AMX, AVX512-BF16); choose fp32")
        self._blocks: Blocks | None = None
        self._making: dict[str, Future[OpenVinoEngine]] = {}
        if bundle.config.get("precision") == "fp32" and bundle.architecture.adapts:
            self._blocks = Blocks(bundle, self._compile, self._precision == "bf16", options)
        else:
            pool = ThreadPoolExecutor(options.threads, "adavit-compile")
            names = [name for name in bundle.engines if name.startswith("blocks.")]
            self._making = {name: pool.submit(self._make, name) for name in names}
            pool.shutdown(wait=False)
        self.always_gathers = self._blocks is not None
        self.fixed = self._blocks.whole if self._blocks else None

    def load(self, name: str, alone: bool = False) -> Engine:
        """An engine; those of converted blocks are made in parallel from the start. See `Backend.load`."""
        if self._blocks and name.startswith("blocks."):
            return self._blocks.load(name)
        try:
            if making := self._making.get(name):
                return making.result()
            return self._make(name, 1 if alone else None)
        except BaseException:
            for making in self._making.values():
                making.cancel()
            raise

    def _make(self, name: str, copies: int | None = None) -> OpenVinoEngine:
        """The engine of a file."""
        model, spec = self._read(name), self._bundle.engine(name)
        found = [[port.any_name for port in ports] for ports in (model.inputs, model.outputs)]
        if found != [[tensor.name for tensor in tensors] for tensors in (spec.inputs, spec.outputs)]:
            raise BackendError(f"engine {spec.name} has other inputs or outputs than config.json says; export again")
        if name in BY_IMAGE:
            model.reshape({port: [1, *port.partial_shape[1:]] for port in model.inputs})
        t2t = self._bundle.architecture.stem == "t2t"
        if t2t and name in WITH_STEM:
            try:
                restructure(model, bf16=name == "stem" and self._precision == "bf16")
            except Exception as error:  # of a graph that no export makes
                raise BackendError(f"OpenVINO refuses engine {name}: {one_line(error)}") from None
        masks = any("K" in tensor.shape for tensor in spec.inputs) and mask_scores(model)
        exact = any(tensor.name in DECISIONS for tensor in spec.outputs) or (t2t and name == "stem")
        return OpenVinoEngine(spec, self._compile(model, exact, copies), masks=masks)

    def _read(self, name: str) -> Any:
        """The model of an engine's file."""
        data = self._bundle.read(name)
        try:
            return self._core.read_model(data)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO refuses engine {name}: {one_line(error)}") from None

    def _compile(self, model: Any, exact: bool, copies: int | None = None) -> Compiled:
        """Compiles a model, to compute in float32 if it has to be exact: so many copies, by default one a worker."""
        copies = copies or self._options.workers
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._options.threads // copies,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32" if exact else PRECISIONS[self._precision],
            "ENABLE_CPU_PINNING": False,
            "CPU_RUNTIME_CACHE_CAPACITY": PREPARED_KEPT,
            "EXCLUSIVE_ASYNC_REQUESTS": EXECUTORS.lost,  # then it compiles in the thread that asks
        }
        EXECUTORS.used = True
        rows = [port.partial_shape for port in model.inputs if len(port.partial_shape) < 4]  # all but images
        if any(shape.is_dynamic for shape in rows):
            properties["SNIPPETS_MODE"] = "DISABLE"  # fused attention may be wrong from the second number of tokens on
        try:
            return Compiled([self._core.compile_model(model, "CPU", properties) for _ in range(copies)])
        except RuntimeError as error:
            raise BackendError(f"OpenVINO refuses {model.get_friendly_name()}: {one_line(error)}") from None

    def prepare(self, used: Mapping[Sizes, float]) -> Mapping[Sizes, float]:
        """See `Backend.prepare`."""
        return self._blocks.prepare(used) if self._blocks else {}

    def buffer(self, shape: tuple[int, ...], dtype: str = "float32") -> OpenVinoBuffer:
        """See `Backend.buffer`."""
        return OpenVinoBuffer.empty(shape, dtype)

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`."""
        return rounded(tokens, self._bundle.architecture.tokens)

    def versions(self) -> dict[str, str]:
        """OpenVINO's version and the precision in use."""
        return {"openvino": openvino.__version__, "precision": self._precision}
