"""What a batch costs the host: python benchmarks/host_cost.py [--json FILE]

Runs T2T-ViT-19 on bindings that do nothing, so that only this package's own Python is left, and counts what it asks of
the device. Checking and copying the images and unpacking results are columns of their own: they grow with the batch
whatever the dispatcher does. Large images leave nothing else in the CPU's caches; "warm" is dispatching without them,
of images that are already in place. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
from models import random_model

from adavit.architecture import Architecture
from adavit.bundle.bundle import Bundle, write_config
from adavit.bundle.capacity import CAPACITY_QUANTILE
from adavit.bundle.graph_keys import GraphKey, constants_of, read_graph
from adavit.bundle.graphs import Graphs
from adavit.bundle.operating_points import TRAINED
from adavit.bundle.policy import Policy
from adavit.bundle.statistics import write_statistics
from adavit.export.bundle import export_bundle
from adavit.export.options import ExportOptions
from adavit.runtime.backend import Options
from adavit.runtime.backends.cuda.backend import DeviceBackend
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.captures import Captures
from adavit.runtime.backends.cuda.lane import DeviceLane
from adavit.runtime.backends.tensorrt.engine import Source, TensorRtEngine
from adavit.runtime.batch import WAYS, rooms_of
from adavit.runtime.batch_dispatcher import BatchDispatcher
from adavit.runtime.cache import cpu_name
from adavit.runtime.capacity_tables import CapacityTables
from adavit.runtime.inputs import checked_images
from adavit.runtime.ways import Ways

BATCHES = 1, 8, 32
ROUNDS, RUNS = 7, 10
SIZES = 32
"""Bytes of the sizes that exact dispatch fetches after each block."""


class NoCuda(Cuda):
    """CUDA that does nothing but hand out host memory, count calls, and answer for what a block takes."""

    def __init__(self, needed: list[bytes]) -> None:
        self.counts: Counter[str] = Counter()
        self._needed, self._next, self._memory = needed, 0, {}
        self.runtime = SimpleNamespace(
            cudaMemcpyKind=SimpleNamespace(
                cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
            ),
            cudaStreamNonBlocking=1,
            cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
        )
        self._results = {"cudaStreamCreateWithFlags": 1, "cudaEventCreateWithFlags": 2, "cudaEventElapsedTime": 0.0,
                         "cudaStreamEndCapture": 3, "cudaGraphInstantiate": 4}  # fmt: skip

    def call(self, name: str, *arguments: Any) -> Any:
        self.counts[name] += 1
        if name in ("cudaMalloc", "cudaMallocHost"):
            raw = (ctypes.c_ubyte * (arguments[0] + 256))()
            address = -(-ctypes.addressof(raw) // 256) * 256
            self._memory[address] = raw
            return address
        if name == "cudaMemcpyAsync" and arguments[2] == SIZES:
            ctypes.memmove(arguments[0], self._needed[self._next % len(self._needed)], SIZES)
            self._next += 1
        return self._results.get(name)


class NoEngine:
    """A TensorRT engine for any shape that computes nothing."""

    num_optimization_profiles, device_memory_size_v2 = 1, 1 << 20

    def __init__(self, tensors: dict[str, int], cuda: NoCuda) -> None:
        self._tensors, self._cuda, self.num_io_tensors = tensors, cuda, len(tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_location(self, name: str) -> int:
        return 0

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size,) * self._tensors[name] for size in (0, 1, 1 << 30)]

    def create_execution_context(self, strategy: int) -> NoContext:
        return NoContext(self._cuda)


class NoContext:
    """Its execution context."""

    def __init__(self, cuda: NoCuda) -> None:
        self._counts = cuda.counts

    def set_device_memory(self, memory: int, size: int) -> None:
        pass

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._counts["set_tensor_address"] += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._counts["set_input_shape"] += 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self._counts["execute_async_v3"] += 1
        return True


TRT = SimpleNamespace(
    TensorLocation=SimpleNamespace(DEVICE=0), ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=0)
)


class NoCaptures(Captures):
    """Conditions without CUDA's: both hold."""

    def __init__(self, cuda: NoCuda) -> None:
        super().__init__(cuda, "not asked")
        self._why.clear()

    def record(self, way: str, stream: int, enqueue: Any) -> Any:
        enqueue(None)
        cuda = self._cuda
        return SimpleNamespace(launch=lambda stream: cuda.call("cudaGraphLaunch", 4, stream), close=lambda: None)


class NoBackend(DeviceBackend):
    """Device memory that is nowhere, engines that do nothing."""

    name = "nothing"

    def __init__(self, graphs: Graphs, needed: list[bytes]) -> None:
        self.none = NoCuda(needed)
        super().__init__(graphs, self.none, NoCaptures(self.none), max(BATCHES))

    def stream(self) -> tuple[int, bool]:
        return 1, True

    def open(self, key: GraphKey, every_head: bool) -> TensorRtEngine:
        graph = read_graph(self.graphs, key)
        left = graph.without(constants_of(self.graphs, key, graph))
        tensors = {value.name: len(value.shape) for value in (*left.inputs, *left.outputs)}
        return TensorRtEngine(NoEngine(tensors, self.none), Source(TRT, key.name, left, str, None))

    def versions(self) -> dict[str, str]:
        return {}


class Timed:
    """Adds up the time of a function's calls."""

    def __init__(self, owner: type, name: str) -> None:
        self.ms, whole = 0.0, getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            began = perf_counter()
            try:
                return whole(*arguments, **options)
            finally:
                self.ms += 1e3 * (perf_counter() - began)

        setattr(owner, name, timed)


class Clock:
    """Times batches: what dispatching takes, what images do, and what results do, each by itself."""

    def __init__(self, side: int) -> None:
        self._side = side
        self._copying = Timed(DeviceLane, "_take")
        self._unpacking = Timed(BatchDispatcher, "_unpacked"), Timed(DeviceLane, "_results")

    def time(self, dispatcher: BatchDispatcher, images: Any, check: bool) -> tuple[float, float, float]:
        """Milliseconds of a batch, the three kinds."""
        for part in (self._copying, *self._unpacking):
            part.ms = 0.0
        began = perf_counter()
        if check:
            checked_images(images, self._side)
        checked = perf_counter()
        dispatcher.run(images, TRAINED)
        whole = 1e3 * (perf_counter() - checked)
        copied, unpacked = self._copying.ms, sum(part.ms for part in self._unpacking)
        return whole - copied - unpacked, 1e3 * (checked - began) + copied, unpacked


def measure(graphs: Graphs, policy: Policy, progress: Any) -> list[dict[str, Any]]:
    """A row for each way and batch size."""
    arch, source, results = graphs.architecture, np.random.default_rng(0), []
    clock, tables = Clock(arch.image_size), CapacityTables(graphs.bundle)
    for batch in BATCHES:
        needed = rooms_of(policy[source.integers(len(policy), size=batch)])
        images = source.standard_normal((batch, 3, arch.image_size, arch.image_size), dtype=np.float32)
        backend = NoBackend(graphs, [np.array(room, np.int64).tobytes() for room in needed])
        dispatchers = {
            way: BatchDispatcher(
                arch, backend, Ways(graphs.bundle, "fp32", Options(threads=1, dispatch=way), backend, True), tables
            )
            for way in WAYS
        }
        for dispatcher in dispatchers.values():
            for _ in range(3):
                dispatcher.run(images, TRAINED)
        with backend.lane(batch) as lane:
            there: Any = lane
        in_place = there._memory.images[0]  # numpy copies nothing to itself
        found: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
        counts: dict[str, Counter[str]] = {}
        for _ in range(ROUNDS):
            for way, dispatcher in dispatchers.items():
                gc.disable()
                backend.none.counts.clear()
                cold = [clock.time(dispatcher, images, True) for _ in range(RUNS)]
                counts[way] = Counter({name: count / RUNS for name, count in backend.none.counts.items()})
                warm = [clock.time(dispatcher, in_place, False)[0] for _ in range(RUNS)]
                gc.enable()
                found[way] += [(*times, alone) for times, alone in zip(cold, warm, strict=True)]
                progress()
        for way in WAYS:
            columns = zip(("own_ms", "images_ms", "results_ms", "warm_ms"), zip(*found[way], strict=True), strict=True)
            medians = {name: statistics.median(column) for name, column in columns}
            results.append({"dispatch": way, "batch": batch, **medians, "calls": dict(counts[way])})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file to write, or - for standard output")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        import torch

        checkpoint, path = Path(folder) / "model.pth", Path(folder) / "bundle"
        torch.save(random_model("t2t_vit_19", "published", 0).state_dict(), checkpoint)
        export_bundle(checkpoint, path, ExportOptions(verify=False, with_dense=False), lambda *_: None)
        policy = random_policies(Bundle.open(path).architecture)
        add_statistics(path, policy)
        graphs = Graphs(Bundle.open(path))
        rows = measure(graphs, policy, lambda: print(".", end="", file=sys.stderr, flush=True))
    print(file=sys.stderr)
    report = {"model": "t2t_vit_19", "cpu": cpu_name(), "cpus": os.cpu_count(), "python": platform.python_version(),
              "numpy": np.__version__, "rows": rows}  # fmt: skip
    if arguments.json and arguments.json != "-":
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1) if arguments.json == "-" else table(report))


def random_policies(arch: Architecture) -> Policy:
    """Policies of about the published usage: only what they take matters here."""
    source = np.random.default_rng(1)
    policy = Policy.dense(arch, 64)
    for mask, share in zip(policy.masks(), (0.6, 0.5, 0.7), strict=True):
        mask[:] = source.random(mask.shape) < share
    policy.tokens[..., 0] = True
    policy.heads[:, : arch.keep] = policy.sublayers[:, : arch.keep] = True
    return policy


def add_statistics(folder: Path, policy: Policy) -> None:
    """Gives a bundle statistics, as if its calibration images had kept this."""
    stored, config = write_statistics(folder, [policy]), Bundle.open(folder).config
    write_config(folder, {**config, "statistics": vars(stored), "capacity_quantile": CAPACITY_QUANTILE})


def table(report: dict[str, Any]) -> str:
    """For people."""
    where = f"{report['cpu']}, Python {report['python']}"
    lines = [f"{report['model']} on bindings that do nothing, ms a batch; {where}", ""]
    lines.append("dispatch     batch  dispatching  warm  images  results  runs  launches  waits  copies")
    for row in report["rows"]:
        calls = row["calls"]
        waits = calls.get("cudaEventSynchronize", 0) + calls.get("cudaStreamSynchronize", 0)
        numbers = [calls.get(name, 0) for name in ("execute_async_v3", "cudaGraphLaunch")]
        lines.append(
            f"{row['dispatch']:<12} {row['batch']:>5} {row['own_ms']:>12.3f} {row['warm_ms']:>5.3f}"
            f" {row['images_ms']:>7.2f} {row['results_ms']:>8.3f} {numbers[0]:>5.0f} {numbers[1]:>9.0f} {waits:>6.0f}"
            f" {calls.get('cudaMemcpyAsync', 0):>7.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
