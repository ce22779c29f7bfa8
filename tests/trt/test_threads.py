"""Several requests at once share a device: lanes of their own, none waiting for another, memory bounded and freed."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import random_images, random_policy
from double import Gpu, add_double_engines, add_statistics
from driving import WAY, assert_all_freed, assert_same, on_device

from adavit.errors import BackendError
from adavit.runtime import Policy, Result, Runtime
from adavit.runtime.backends.cuda.backend import LANES
from adavit.runtime.batch import WAYS

THREADS = 8


def at_once(calls: list[Callable[[], Any]], threads: int = THREADS) -> list[Any]:
    """What calls return that are made from several threads."""
    with ThreadPoolExecutor(threads) as pool:
        return [future.result(60) for future in [pool.submit(call) for call in calls]]


@pytest.fixture
def lanes(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many lanes there are whenever one is made: each has a stream of its own, and some record on one more."""
    found, create = [], gpu.new_stream

    def counted() -> Any:
        stream = create()
        found.append(gpu.alive["event"] // 2)
        return stream

    monkeypatch.setattr(gpu, "new_stream", counted)
    return found


@WAY
def test_results_are_right_whoever_else_runs(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, lanes: list[int], way: str
) -> None:
    on_gpu, arch = on_device(roomy(), way), runtime.architecture
    batches = [random_images(arch, 1 + (5 * seed) % 11, seed) for seed in range(24)]
    wanted = [runtime.run(images) for images in batches]
    policies = [random_policy(arch, len(images), seed) for seed, images in enumerate(batches)]
    replayed = [runtime.run(images, policy) for images, policy in zip(batches, policies, strict=True)]
    dense = [runtime.run_dense(images) for images in batches]
    calls: list[Callable[[], Any]] = []
    for images, policy in zip(batches, policies, strict=True):
        calls += [
            partial(on_gpu.run, images),
            partial(on_gpu.run, images, policy),
            partial(on_gpu.run_dense, images),
        ]
    found = at_once(calls)
    for number in range(len(batches)):
        assert_same(found[3 * number], wanted[number])
        assert_same(found[3 * number + 1], replayed[number])
        np.testing.assert_allclose(found[3 * number + 2], dense[number], atol=1e-4)
    assert 1 < max(lanes) <= LANES
    memory = len(gpu.memory)
    at_once(calls)
    assert len(gpu.memory) <= memory <= 3 * LANES
    del on_gpu, calls
    assert_all_freed(gpu)


def test_ways_at_once(roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu) -> None:
    """Runtimes of one process share a device, not its memory."""
    on_gpu = [on_device(roomy(), way) for way in (*WAYS, "auto")]
    batches = [random_images(runtime.architecture, 1 + seed % 5, seed) for seed in range(32)]
    found = at_once([partial(on_gpu[number % 4].run, images) for number, images in enumerate(batches)])
    for result, images in zip(found, batches, strict=True):
        assert_same(result, runtime.run(images))
    del on_gpu
    assert_all_freed(gpu)


@contextmanager
def held(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, Callable[[], None]]]:
    """The next wait of a thread that calls the second value lasts until the block ends; the first says it began."""
    waits, goes_on, who = threading.Event(), threading.Event(), set[int]()
    reach = gpu.reach

    def reached(moment: Any) -> None:
        if threading.get_ident() in who:
            who.remove(threading.get_ident())
            waits.set()
            assert goes_on.wait(60)
        reach(moment)

    monkeypatch.setattr(gpu, "reach", reached)
    try:
        yield waits, lambda: who.add(threading.get_ident())
    finally:
        goes_on.set()


def held_run(runtime: Runtime, images: np.ndarray, hold: Callable[[], None]) -> Result:
    """Runs images; its first wait is held."""
    hold()
    return runtime.run(images)


@WAY
def test_who_waits_for_the_device_stops_nobody(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu, images = on_device(roomy(), way), random_images(runtime.architecture, 3)
    for _ in range(3):
        on_gpu.run(images)
    other = random_images(runtime.architecture, 4, 2)
    with ThreadPoolExecutor(1) as pool, held(gpu, monkeypatch) as (waits, hold):
        first = pool.submit(held_run, on_gpu, images, hold)
        assert waits.wait(60)
        for _ in range(3):  # makes a lane, records its graphs, launches them
            assert_same(on_gpu.run(other), runtime.run(other))
            np.testing.assert_allclose(on_gpu.run_dense(other), runtime.run_dense(other), atol=1e-4)
        assert on_gpu.backend.timings()["gpu_ms"] > 0
        assert not first.done()
    assert_same(first.result(60), runtime.run(images))


def test_who_measures_the_ways_stops_nobody(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others go exact meanwhile."""
    on_gpu, images = on_device(roomy(), "auto"), random_images(runtime.architecture, 3)
    with ThreadPoolExecutor(1) as pool, held(gpu, monkeypatch) as (waits, hold):
        first = pool.submit(held_run, on_gpu, images, hold)
        assert waits.wait(60)
        for batch in (3, 8):
            other = random_images(runtime.architecture, batch, 2)
            assert_same(on_gpu.run(other), runtime.run(other))
        dispatcher: Any = on_gpu.dispatcher
        assert [went.way for went in dispatcher.ran] == ["exact"] * 2
    assert_same(first.result(60), runtime.run(images))


@pytest.mark.parametrize("refused", ["run", "memory"])
@WAY
def test_a_lane_that_fails_is_closed_and_others_go_on(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, way: str, refused: str
) -> None:
    on_gpu, images = on_device(roomy(), way), random_images(runtime.architecture, 3)
    for turn in range(2 * LANES + 2):
        gpu.refuse.add(refused)
        with pytest.raises(BackendError):
            on_gpu.run(random_images(runtime.architecture, 2 + turn % 5))
            on_gpu.run(random_images(runtime.architecture, 32 - turn % 5))
        gpu.refuse.remove(refused)
    if refused == "run":
        assert not gpu.memory and not gpu.alive["stream"] and not gpu.alive["context"]
    for _ in range(3):
        assert_same(on_gpu.run(images), runtime.run(images))
    del on_gpu
    assert_all_freed(gpu)


def test_lanes_that_cannot_be_freed_hold_up_nobody(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their places are not lost, so that nobody waits for one without end."""
    on_gpu, free = on_device(roomy(), "exact"), gpu.free

    def broken(kind: str, address: int) -> None:
        free(kind, address)
        raise BackendError("cudaFree failed: a reason (CUDA error 700)")

    def fail_often() -> None:
        backend: Any = on_gpu.backend
        for _ in range(2 * LANES):
            with ExitStack() as all_lanes, suppress(BackendError):
                for batch in (1, 1, 1, 2):
                    all_lanes.enter_context(backend.lane(batch))
            with suppress(BackendError):
                on_gpu.run(random_images(runtime.architecture, 32))

    monkeypatch.setattr(gpu, "free", broken)
    thread = threading.Thread(target=fail_often, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits"
    monkeypatch.setattr(gpu, "free", free)
    images = random_images(runtime.architecture, 2)
    assert_same(on_gpu.run(images), runtime.run(images))


def test_memory_that_grows_for_one_is_not_taken_from_another(bundle: Path, runtime: Runtime, gpu: Gpu) -> None:
    """Engines that are opened later take more memory: graphs that were recorded keep what they have."""
    arch = runtime.architecture
    add_statistics(bundle, Policy.dense(arch, 16))
    on_gpu = on_device(add_double_engines(bundle, usual=[(0, 1, 2), (0, 2), (1,)]), "capacity")
    first, second = random_images(arch, 4, 1), random_images(arch, 3, 2)
    for _ in range(3):
        on_gpu.run(first)  # its overflows open engines with all heads
        on_gpu.run(second)
    shown: list[Any] = []
    on_gpu.run(first, observe=shown.append)
    on_gpu.run_dense(first)
    for images in (second, first, random_images(arch, 1), first, second):
        assert_same(on_gpu.run(images), runtime.run(images))


def test_a_lane_that_was_there_before_larger_engines(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is in use, another lane opens an engine that takes more; then it meets another size."""
    on_gpu, arch = on_device(roomy(), "capacity"), runtime.architecture
    sizes = [random_images(arch, batch, batch) for batch in (8, 7)]
    for _ in range(3):
        on_gpu.run(sizes[0])
    with ThreadPoolExecutor(1) as pool, held(gpu, monkeypatch) as (waits, hold):
        first = pool.submit(held_run, on_gpu, sizes[0], hold)
        assert waits.wait(60)
        on_gpu.run_dense(random_images(arch, 1))  # on a lane of its own
    assert_same(first.result(60), runtime.run(sizes[0]))
    for images in (sizes[1], sizes[0], sizes[1], sizes[0]):
        assert_same(on_gpu.run(images), runtime.run(images))
    del on_gpu
    assert_all_freed(gpu)
