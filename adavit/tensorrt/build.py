"""Adds sets of TensorRT engines to a bundle."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path, PurePosixPath
from typing import Any

from adavit.bundle.bundle import Bundle, write_config
from adavit.bundle.engine_set import EngineKey, this_platform
from adavit.bundle.engine_set_reading import read_engine_set
from adavit.bundle.engine_sets import engine_sets
from adavit.bundle.graph_keys import constants_of, graph_keys, part_keys, read_graph
from adavit.bundle.graphs import Graphs
from adavit.bundle.statistics import policies_of, usual_heads
from adavit.bundle.trust import remember_built
from adavit.errors import BackendError, BundleError, InputError
from adavit.files import folder_beside
from adavit.runtime.capacity import CapacityTable
from adavit.tensorrt import worker
from adavit.tensorrt.options import BuildOptions
from adavit.tensorrt.profiles import profiles_of
from adavit.tensorrt.worker import Builder

__all__ = ["add_engines"]

Progress = Callable[[str, float], None]

FOLDER = "tensorrt"


def add_engines(folder: Path, options: BuildOptions, progress: Progress) -> dict[str, Any]:
    """Builds engines of every graph for devices of the bundle `folder`, for each target and precision, and adds them.

    A set appears in `config.json` when all its engines are there; until then nothing in the bundle changes. It is
    remembered that this user built it here, so that it may run here.

    Returns:
        For each set's key, the report of its engines: layers, precisions, profiles, size and time.

    Raises:
        InputError: a target cannot do what the options ask for, or the bundle lacks the statistics for it.
        BundleError: the bundle is damaged.
        BackendError: TensorRT is not installed, or refuses an engine.
    """
    options.check()
    precisions = tuple(Bundle.open(folder).graphs)
    sets = [(flavour, precision) for flavour in options.target for precision in precisions]
    return dict(_add_set(folder, *one, options, progress) for one in sets)


def _add_set(
    folder: Path, flavour: str, precision: str, options: BuildOptions, progress: Progress
) -> tuple[str, dict[str, Any]]:
    began = time.perf_counter()
    bundle, stage = Bundle.open(folder), f"building {flavour}"
    progress(stage, 0.0)
    with _workers(flavour, bundle, precision, options) as (pool, builder):
        capabilities = (f"sm{value}" for value in builder.compute_capabilities)
        key = "-".join((flavour, precision, builder.version, this_platform(), *capabilities))
        place = _free_place(bundle, key)
        place.parent.mkdir(exist_ok=True)
        try:
            with folder_beside(place) as output:
                made = _build_all(pool, Graphs(bundle, precision), options, output, stage, progress)
                engines = {engine.name: about for engine, about in made.items()}
                report = {"seconds": time.perf_counter() - began, "precision": precision, "engines": engines}
                (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        finally:
            with suppress(OSError):  # where there is a set
                (folder / FOLDER).rmdir()
    entry = {
        "flavour": flavour,
        "version": builder.version,
        "platform": this_platform(),
        "compute_capabilities": list(builder.compute_capabilities),
        "hardware_compatible": options.hardware_compatible,
        "version_compatible": options.version_compatible,
        "stripped": options.strip_weights,
        "max_batch": options.max_batch,
        "precision": precision,
        "engines": [
            {
                **engine.graph.to_dict(),
                "file": f"{FOLDER}/{place.name}/{engine.name}.engine",
                **{
                    name: about[name]
                    for name in ("heads", "bytes", "unpacked_bytes", "sha256", "source")
                    if name in about
                },
            }
            for engine, about in made.items()
        ],
    }
    replace_set(folder, key, entry)
    remember_built(read_engine_set(key, entry, bundle.architecture.heads).fingerprint, key)
    return key, report


@contextmanager
def _workers(
    flavour: str, bundle: Bundle, precision: str, options: BuildOptions
) -> Iterator[tuple[ProcessPoolExecutor, Builder]]:
    """Worker processes, and what they build with. Ctrl-C does not reach them: it ends this block, which ends them."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.jobs, context, worker.start, (flavour, bundle.path, precision, options))
    try:
        with _interrupts_later():
            described = pool.submit(worker.describe)
        yield pool, described.result()
    except BrokenProcessPool:
        raise BackendError(f"the {flavour} builder died; if memory ran out, build with fewer `jobs`") from None
    except BaseException:
        for process in list(pool._processes.values()):  # none is worth waiting for; later Pythons have kill_workers()
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Keeps Ctrl-C back until the block ends, and from the processes that start in it."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # else multiprocessing starts it with the first process, and lets Ctrl-C through
    interrupts = []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))  # for what other threads are told
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


def _build_all(
    pool: ProcessPoolExecutor, graphs: Graphs, options: BuildOptions, output: Path, stage: str, progress: Progress
) -> dict[EngineKey, dict[str, Any]]:
    """Builds all engines into a folder; returns their reports, in the order of the graphs."""
    jobs = _jobs(graphs, options, output)
    # The dense twin first, so that no worker is left with it at the end.
    large_first = sorted(jobs, key=lambda job: job.key.graph.role == "block")
    with _interrupts_later():
        running = {pool.submit(worker.build, job): job.key for job in large_first}
    made = {}
    try:
        for done, future in enumerate(as_completed(running), 1):
            made[running[future]] = future.result()
            progress(stage, done / len(running))
    finally:
        for future in running:
            future.cancel()
    return {job.key: made[job.key] for job in jobs}


def _jobs(graphs: Graphs, options: BuildOptions, output: Path) -> list[worker.Job]:
    bundle, arch = graphs.bundle, graphs.architecture
    policies = policies_of(bundle)
    if options.leave_out_heads and not policies:
        raise InputError(
            f"{graphs.path}: has no statistics, which tell what heads images usually keep; export again with "
            "`calibration_images`, or leave out `leave_out_heads`"
        )
    usual = usual_heads(policies) if options.leave_out_heads else []
    rooms = CapacityTable(arch, policies, bundle.capacity_quantile).rooms if policies else None
    found = []
    for key, heads in _engines(graphs, options.conditional, usual):
        graph = read_graph(graphs, key.graph)
        constants = constants_of(graphs, key.graph, graph)
        inputs = [value for value in graph.inputs if value.name not in constants]
        try:
            profiles = profiles_of(inputs, key.graph.block, arch, options.max_batch, rooms)
        except ValueError as error:
            raise BundleError(f"{graphs.path}: {key.name}: {error}; export again") from None
        found.append(worker.Job(key, heads, profiles, output / f"{key.name}.engine"))
    return found


def _engines(
    graphs: Graphs, parts: bool, usual: Sequence[tuple[int, ...]]
) -> Iterator[tuple[EngineKey, tuple[int, ...] | None]]:
    """The engines to build, and the heads of those that have their block's usual heads alone.

    Images that want other heads run again through whole blocks, so that no part needs an engine of all heads then.
    """
    files = graphs.files
    for graph in graph_keys(files) + part_keys(files) * parts:
        heads = usual[graph.block] if usual and graph.block is not None and graph.part != "decisions" else None
        if heads is not None and len(heads) < graphs.architecture.heads:
            yield EngineKey(graph, usual=True), heads
            if graph.part is not None:
                continue
        yield EngineKey(graph), None


def _free_place(bundle: Bundle, key: str) -> Path:
    """Where to put a set: under its key, or beside a set of that key, which stays until the new one is described."""
    taken = {Path(e.file).parent.name for s in engine_sets(bundle) for e in s.engines.values()}
    return bundle.path / FOLDER / (key if key not in taken else f"{key}-again")


def replace_set(folder: Path, key: str, entry: dict[str, Any]) -> None:
    """Puts a set into `config.json`, as its last, then removes the folder of the set it replaces."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    replaced = config.setdefault("engine_sets", {}).pop(key, None)
    config["engine_sets"][key] = entry
    write_config(folder, config)
    if replaced:
        for old in {PurePosixPath(engine["file"]).parts for engine in replaced["engines"]}:
            if len(old) == 3 and old[0] == FOLDER and ".." not in old:  # the description may be hostile
                shutil.rmtree(folder / FOLDER / old[1], ignore_errors=True)
