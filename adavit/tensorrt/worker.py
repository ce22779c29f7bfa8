"""Builds one engine after the other in a process of its own: Polygraphy is for one flavour in a process.

What TensorRT and its libraries print goes to a file, from which a refusal quotes.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from adavit.bundle.bundle import Bundle
from adavit.bundle.engine_set import EngineKey, numeric_version
from adavit.bundle.engine_sets import packed_engine, source_of
from adavit.bundle.graph_keys import constants_of, read_graph
from adavit.bundle.graphs import Graphs
from adavit.errors import BackendError, install_hint
from adavit.files import sha256
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.tensorrt.options import BuildOptions
from adavit.tensorrt.profiles import Profile

__all__ = ["Builder", "Job", "build", "describe", "start"]

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "BOOL": "bool",
}
"""TensorRT's names of types, and ours."""


@dataclass(frozen=True)
class Job:
    """An engine to build.

    Attributes:
        key: of the engine.
        heads: the usual ones of its block, where it has these alone.
        profiles: its optimisation profiles.
        output: where to write it.
    """

    key: EngineKey
    heads: tuple[int, ...] | None
    profiles: list[Profile]
    output: Path


@dataclass(frozen=True)
class Builder:
    """What builds here.

    Attributes:
        version: of TensorRT.
        compute_capabilities: what the engines will be for.
    """

    version: str
    compute_capabilities: tuple[int, ...]


class _Worker:
    """The state of a worker process."""

    def __init__(self, flavour: str, bundle: Path, precision: str, options: BuildOptions) -> None:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(flavour == "tensorrt-rtx"))
        self.flavour = flavour
        self.options = options
        self.log = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115  (as long as the process)
        for stream in (1, 2):
            os.dup2(self.log.fileno(), stream)
        self.trt, self.loaders, self.refused = _import(flavour)
        self.timing_cache = str(options.timing_cache) if options.timing_cache else None
        self.graphs = Graphs(Bundle.open(bundle), precision)

    def logged(self) -> str:
        """What was printed since the last call."""
        end = self.log.tell()
        self.log.seek(0)
        text = self.log.read(end).decode(errors="replace")
        self.log.seek(0)
        self.log.truncate()
        return text

    def compute_capabilities(self) -> tuple[int, ...]:
        """What the options ask for, else all that the builder knows (RTX) or this machine's GPU."""
        if self.flavour == "tensorrt":
            return (Cuda().compute_capability(),)
        known = _known_capabilities(self.trt)
        if unknown := set(self.options.compute_capability) - set(known):
            raise BackendError(
                f"TensorRT-RTX {self.trt.__version__} does not build for compute capability {min(unknown)}; "
                f"it does for {', '.join(map(str, known))}; for other GPUs build with `target` tensorrt, on the device"
            )
        return self.options.compute_capability or tuple(value for value in known if value >= 80)

    def configure(self, _: Any, __: Any, config: Any) -> None:
        """Puts into a builder's configuration what TensorRT-RTX alone has.

        These are the compute capabilities, and that engines allocate nothing while they run, so that they can be
        captured in CUDA graphs.
        """
        if self.flavour == "tensorrt-rtx":
            config.set_flag(self.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
            chosen = self.compute_capabilities()
            config.num_compute_capabilities = len(chosen)
            for index, value in enumerate(chosen):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{value}"), index)


_task: tuple[str, Path, str, BuildOptions]


def start(*task: Any) -> None:
    """Makes this process a worker; what can fail is left to the first call, whose errors reach the parent."""
    global _task
    _task = task
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent has ended, even by SIGKILL and while TensorRT builds, which frees the GIL."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _worker() -> _Worker:
    return _Worker(*_task)


def describe() -> Builder:
    """What this worker builds with and for; raises BackendError where it cannot do what the options ask."""
    worker = _worker()
    if worker.flavour == "tensorrt-rtx" and worker.options.strip_weights:
        _check_for_gpu()
    return Builder(numeric_version(str(worker.trt.__version__)), worker.compute_capabilities())


def _check_for_gpu() -> None:
    """Raises BackendError where there is none, which TensorRT-RTX tells of in words of its compiler's."""
    try:
        Cuda()
    except BackendError as error:
        raise BackendError(f"TensorRT-RTX leaves out weights only where there is a GPU: {error}") from None


def build(job: Job) -> dict[str, Any]:
    """Builds an engine, writes it, and reports on it.

    Raises:
        BackendError: TensorRT refuses; the message names the operator, the node and the engine.
    """
    began = time.perf_counter()
    worker = _worker()
    trt, loaders, graph = worker.trt, worker.loaders, read_graph(worker.graphs, job.key.graph)
    data = graph.model(constants_of(worker.graphs, job.key.graph, graph, job.heads))
    worker.logged()
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or None  # 11 knows no other networks
    try:
        parts = loaders.NetworkFromOnnxBytes(data, strongly_typed=typed)()
    except worker.refused as error:
        raise _refusal(job.key.name, _parser_error(trt, data, typed) or f"it ({error})") from None
    layers = [{"name": layer.name, "type": layer.type.name, "precision": _precision(layer)} for layer in parts[1]]
    config = builder_config(worker, job.profiles)
    try:
        blob = bytes(loaders.EngineBytesFromNetwork(parts, config, worker.timing_cache)())
    except worker.refused as error:
        raise _refusal(job.key.name, _build_error(layers, worker.logged()) or f"it ({error})") from None
    packed = packed_engine(blob)
    job.output.write_bytes(packed)
    return {
        "bytes": len(packed),
        "unpacked_bytes": len(blob),
        "sha256": sha256(packed),
        "source": source_of(worker.graphs.files, job.key.graph),
        **({} if job.heads is None else {"heads": list(job.heads)}),
        "seconds": time.perf_counter() - began,
        "precisions": dict(Counter(layer["precision"] for layer in layers)),
        "profiles": job.profiles,
        "layers": layers,
    }


def _import(flavour: str) -> tuple[Any, Any, type[Exception]]:
    """TensorRT, Polygraphy's loaders, and what these raise where TensorRT refuses."""
    try:
        if flavour == "tensorrt-rtx":
            import tensorrt_rtx as trt
        else:
            import tensorrt as trt
        from polygraphy.backend import trt as loaders
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except (ImportError, OSError) as error:
        raise BackendError(
            f"building {flavour} engines needs packages that are missing here ({error}); run: {install_hint(flavour)}"
        ) from None
    G_LOGGER.module_severity = G_LOGGER.ERROR
    return trt, loaders, PolygraphyException


def _known_capabilities(trt: Any) -> list[int]:
    names = trt.ComputeCapability.__members__
    return sorted(int(name[2:]) for name in names if name.startswith("SM"))


def builder_config(worker: _Worker, profiles: list[Profile]) -> Any:
    """Polygraphy's loader of the builder's configuration."""
    trt, loaders, options = worker.trt, worker.loaders, worker.options
    made = []
    for profile in profiles:
        made.append(loaders.Profile())
        for name, (least, tuned, most) in profile.items():
            made[-1].add(name, least, tuned, most)
    level = trt.HardwareCompatibilityLevel.AMPERE_PLUS if options.hardware_compatible else None
    config = loaders.CreateConfig(
        profiles=made,
        memory_pool_limits={trt.MemoryPoolType.WORKSPACE: options.workspace << 20} if options.workspace else None,
        builder_optimization_level=options.builder_optimization_level,
        strip_plan=options.strip_weights,
        version_compatible=options.version_compatible,
        exclude_lean_runtime=options.version_compatible,
        hardware_compatibility_level=level,
        load_timing_cache=worker.timing_cache,
    )
    return loaders.PostprocessConfig(config, worker.configure)


def _precision(layer: Any) -> str:
    """The type of what a layer computes."""
    types = {layer.get_output(i).dtype.name for i in range(layer.num_outputs)}
    return "+".join(sorted(DTYPES.get(name, name.lower()) for name in types))


def _refusal(engine: str, why: str) -> BackendError:
    return BackendError(f"engine {engine}: TensorRT refuses {' '.join(why.split())[:500]}")


def _parser_error(trt: Any, data: bytes, typed: bool | None) -> str | None:
    """Operator and node that the parser stumbles over, read by parsing once more: Polygraphy only prints them."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typed else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    parser.parse(data)
    if not parser.num_errors:
        return None
    error = parser.get_error(0)
    return f"operator {error.node_operator()}, node {error.node_name()!r} ({error.code().name}: {error.desc()})"


def _build_error(layers: list[dict[str, Any]], log: str) -> str | None:
    """The first of the builder's messages, with the layer and node it speaks of."""
    message = next((line.removeprefix("[E] ") for line in log.splitlines() if line.startswith("[E]")), None)
    if message is None:
        return None
    named = [layer for layer in layers if re.search(rf"(?<![\w.]){re.escape(layer['name'])}", message)]
    if not named:
        return f"it ({message})"
    layer = max(named, key=lambda found: len(found["name"]))
    return f"operator {layer['type']}, node {layer['name']!r} ({message})"
