"""OpenVINO on the CPU.

A block's graph is compiled with its weights as inputs, so that one model serves all blocks of a kind. A model for every
block would have kernels and memory of its own, which are no longer in the cache when its block's turn comes.

OpenVINO prepares its operators anew for every number of tokens that it has not seen: 0.5 to 3 ms of a block that takes
0.3. So numbers of tokens are rounded up to a few. The further rows are the class token's, which come out the same every
time, and which attention takes once, by a mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Arrays
from adavit.bundle.keys import BlockKey, Sublayers
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.errors import BackendError, OptionError, install_hint, one_line, raise_interrupt
from adavit.runtime.backend import Float, Index, Options, Usage
from adavit.runtime.backends.host import Constants, HostBackend, HostSlot, Prepared, matrix_bytes
from adavit.runtime.forks import keep_in_fork, renew_in_fork
from adavit.runtime.head_cache import HeadCache, in_file

try:
    import openvino

    from adavit.runtime.backends.openvino.compiled import Compiled
    from adavit.runtime.backends.openvino.models import (
        HANDED,
        MASK,
        bf16_tensor_of,
        compute_in_bf16,
        mask_of,
        mask_scores,
        rounded,
        tensor_of,
        unfold,
    )
except ImportError as error:
    raise_interrupt(error)
    raise BackendError(f"OpenVINO does not import ({error}); run: {install_hint('openvino')}") from None

__all__ = ["OpenVinoBackend"]

PREPARED_KEPT = 512
"""Of the operators that a model prepares. With half as many, varied policies took 4 % longer, with more no less."""
HEADS = 16 << 20
"""Bytes of the weights of heads that are kept."""
OFTEN = 1 / 16
"""How often an image has to run a block with some heads for a model of their own."""
MOST_BYTES = 96 << 20
"""Of the weights in such models; each takes two to three times as much, and 100 ms to compile."""
MOST_WITH_THREADS = 8
"""Of such models that run on several threads: each holds two threads, which OpenVINO gives to the next when it goes."""
OUTSIDE = -1
"""The number of requests that are of no block."""


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


class OpenVinoBackend(HostBackend[Compiled]):
    """Runs graphs in OpenVINO on the CPU.

    Args:
        graphs: what to run.
        options: threads, what they share, and as the provider "fp32" or "bf16": of fp32 graphs by default bf16 where
            the CPU computes in it (AMX, AVX512-BF16), else fp32. Decisions are fp32 in either.

    Raises:
        BackendError: OpenVINO is not installed, or the CPU does not compute in the precision asked for, or it refuses
            a graph.
        OptionError: there is no such precision.
    """

    name = "openvino"

    def __init__(self, graphs: Graphs, options: Options) -> None:
        super().__init__(graphs, options)
        self._core = openvino.Core()
        keep_in_fork(self._core)
        self._bf16 = self._computes_in_bf16(options.provider)
        self._rounded: dict[int, Any] = {}
        self.heads = HeadCache(graphs, self._as_tensors, HEADS)
        if graphs.architecture.adapts:
            self._load_blocks(options.threads_of(1))

    def _computes_in_bf16(self, provider: str | None) -> bool:
        able = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if provider not in (None, "fp32", "bf16"):
            raise OptionError(f"OpenVINO has no precision {provider!r}; choose fp32 or bf16")
        if provider == "bf16" and self.graphs.precision != "fp32":
            raise OptionError(f"OpenVINO computes {self.graphs.precision} graphs as they are; bf16 is for fp32 ones")
        if provider == "bf16" and not able:
            raise BackendError("this CPU does not compute in bf16 (AMX, AVX512-BF16); choose fp32")
        return provider == "bf16" or (provider is None and able and self.graphs.precision == "fp32")

    def slot(self, threads: int) -> OpenVinoSlot:
        """See `Backend.slot`."""
        return OpenVinoSlot(self, threads)

    def dense(self, images: Float) -> Float:
        """See `Backend.dense`."""
        compiled = self._dense()
        logits = np.empty((len(images), self.graphs.architecture.classes), np.float32)
        given = {"images": np.ascontiguousarray(images), "logits": logits}  # tensors do not keep their memory
        compiled.run(OUTSIDE, [tensor_of(given[name]) for name in compiled.names])
        return logits

    def weights(self, block: int, sublayers: Sublayers) -> dict[str, Any]:
        """The values of a block's own weights, by the names of its graph's inputs."""
        return self._as_tensors(self._blocks[block, sublayers].arrays(self.graphs.tensors))

    def choose(self, usage: Usage) -> Sequence[Prepared]:
        """See `Backend.choose`: what comes most often; by its bytes, every block gains as much."""
        often = Counter[Prepared]()
        for use, share in usage.items():
            if use.key.heads and any(use.key.sublayers):
                often[Prepared(use.threads, use.key)] += share  # type: ignore[assignment]
        arch, chosen = self.graphs.architecture, list[Prepared]()
        free, with_threads = MOST_BYTES, 0
        for prepared, share in often.most_common():
            size = matrix_bytes(arch, prepared.key) * self._workers(prepared.threads)
            if share < OFTEN or size > free or (prepared.threads > 1 and with_threads == MOST_WITH_THREADS):
                continue
            chosen.append(prepared)
            free -= size
            with_threads += prepared.threads > 1
        return chosen

    def prepare(self, wanted: Prepared) -> None:
        """See `Backend.prepare`."""
        block, sublayers, _ = wanted.key
        graph = self._blocks[block, sublayers]

        def constants() -> Constants:
            own = graph.arrays(self.graphs.tensors)
            return own | dict(self.graphs.quantised_head_weights(wanted.key))

        compiled = self._make(graph, constants, wanted.threads)
        compiled.compile_all()
        self._add(wanted, compiled)

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`."""
        return rounded(tokens, self.graphs.architecture.tokens)

    def versions(self) -> dict[str, str]:
        """OpenVINO's version and the precision in use."""
        return {"openvino": openvino.__version__, "precision": "bf16" if self._bf16 else "fp32"}

    def _as_tensors(self, arrays: Arrays) -> dict[str, Any]:
        """Weights as inputs of these names; of those that lie in the weights' file, there is one copy."""
        return {name: self._as_tensor(array, self._bf16 and name in HANDED) for name, array in arrays.items()}

    def _as_tensor(self, array: npt.NDArray[Any], to_bf16: bool) -> Any:
        if not to_bf16:
            return tensor_of(array)
        if not in_file(array):
            return bf16_tensor_of(array)
        at = array.ctypes.data
        if at not in self._rounded:
            self._rounded[at] = bf16_tensor_of(array)
        return self._rounded[at]

    def _workers(self, threads: int) -> int:
        """How many run images at once, on so many threads each."""
        return self._options.threads if threads == 1 else 1

    def _make(self, graph: OnnxGraph, constants: Callable[[], Constants], threads: int) -> Compiled:
        # A whole model: OpenVINO follows no references of models that it is given as bytes.
        return Compiled(
            graph.name, self._workers(threads), lambda: self._compile(graph, graph.model(constants()), threads)
        )

    def _compile(self, graph: OnnxGraph, model: bytes, threads: int) -> Any:
        """Compiles a model to run on so many threads.

        With no stream, it runs in the thread that asks, and has no threads of its own; with one, it has two.
        """
        alone = threads == 1 or EXECUTORS.lost
        EXECUTORS.used = EXECUTORS.used or not alone
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 0 if alone else 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
            "CPU_RUNTIME_CACHE_CAPACITY": PREPARED_KEPT,
        }
        if "images" in {value.name for value in graph.inputs}:
            properties["LP_TRANSFORMS_MODE"] = False  # it fails on heads of int8 channels, and int8 is then slower
        else:
            properties["SNIPPETS_MODE"] = "DISABLE"  # fused attention may be wrong from the second number of tokens on
        try:
            return self._core.compile_model(self._read(graph, model), "CPU", properties)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO refuses graph {graph.name}: {one_line(error)}") from None

    def _read(self, graph: OnnxGraph, model: bytes) -> Any:
        """A model as OpenVINO's own, changed to run faster."""
        found = self._core.read_model(model)
        unfold(found)
        if "tokens" in {value.name for value in graph.inputs}:
            mask_scores(found)
        if self._bf16:
            compute_in_bf16(found)
        return found


class OpenVinoSlot(HostSlot):
    """An image's tokens, decisions and logits, and what runs its blocks on them; see `Slot`.

    Args:
        backend: compiles the models.
        threads: that run the image.
    """

    def __init__(self, backend: OpenVinoBackend, threads: int) -> None:
        super().__init__(backend.graphs, tensor_of)
        self._backend, self._threads = backend, threads
        self._bound: dict[tuple[int, Sublayers, bool], list[Any]] = {}

    def stem(self, image: Float) -> None:
        """See `Slot.stem`."""
        compiled, image = self._backend.stem(self._threads), np.ascontiguousarray(image)
        compiled.run(OUTSIDE, self._tensors(compiled, 0, {"images": tensor_of(image)}))
        self._coming = 0

    def block(self, key: BlockKey, tokens: Index) -> None:
        """See `Slot.block`."""
        constant = self._backend.constant.get(Prepared(self._threads, key))
        compiled = constant or self._backend.shared(key.block, key.sublayers, self._threads)
        tensors = self._bind(key, compiled, constant is None).copy()
        lease = None if constant else self._backend.heads.acquire(key)
        count = len(tokens)
        rows = self._backend.rounded(count)
        for position, name in enumerate(compiled.names):
            if name == "tokens":
                self._kept[:count] = tokens
                self._kept[count:rows] = 0
                tensors[position] = self._indices(rows)
            elif name == MASK:
                tensors[position] = mask_of(count, rows)
            elif lease and name in lease.values:
                tensors[position] = lease.values[name]
        try:
            compiled.run(key.block, tensors)
        finally:
            if lease:
                self._backend.heads.release(lease)
        self._coming = key.block + 1

    def _bind(self, key: BlockKey, compiled: Compiled, takes_weights: bool) -> list[Any]:
        """The tensors that a block's model runs on, but for the kept tokens and what heads have of their own."""
        name = key.block, key.sublayers, takes_weights
        found = self._bound.get(name)
        if found is None:
            given = self._backend.weights(key.block, key.sublayers) if takes_weights else {}
            found = self._bound[name] = self._tensors(compiled, key.block + 1, given)
        return found

    def _tensors(self, compiled: Compiled, deciding: int, given: Mapping[str, Any]) -> list[Any]:
        """What a model runs on that decides for a block; None where it is not known yet."""
        memory = self._values(given, deciding)
        return [memory.get(name) for name in compiled.names]
