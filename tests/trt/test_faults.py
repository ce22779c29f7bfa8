"""Faults that are made by hand in what drives a device are caught: by wrong numbers, or by rules of the double."""

import gc
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from cases import assert_same_policy, random_images, random_policy
from double import Gpu, add_double_engines, add_statistics
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

import adavit
from adavit.bundle.graph_keys import STEM_GRAPH
from adavit.bundle.operating_points import Offsets
from adavit.errors import BackendError
from adavit.runtime import Policy, Result, Runtime
from adavit.runtime.backends.cuda import captures
from adavit.runtime.backends.cuda.backend import LanePool
from adavit.runtime.backends.cuda.capture import Executable, Recording
from adavit.runtime.backends.cuda.lane import DeviceLane
from adavit.runtime.backends.cuda.memory import LaneMemory
from adavit.runtime.backends.cuda.runners import Runners
from adavit.runtime.batch import CAPACITY, CONDITIONAL, EXACT, WAYS, Finished
from adavit.runtime.batch_dispatcher import BatchDispatcher

Patch = pytest.MonkeyPatch
CAUGHT = AssertionError, BackendError, InvalidArgument
"""The last is what ONNX Runtime says of numbers that are none, in the place of an engine."""
TURNS, SIZES = 6, (3, 2)
BUDGETS = [
    Offsets((0, 3, -3), (-1, 0, 2), (1, -1, 0)),
    Offsets(1.0, -0.5, 0.5),
    Offsets(-50.0, -50.0, -50.0),
    Offsets(50.0, 50.0, 50.0),
]


@pytest.fixture(scope="module")
def tight(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with statistics of images that keep next to nothing, and engines that lack some heads."""
    bundle = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("tight") / "bundle")
    policy = Policy.dense(adavit.load(bundle, threads=1, specialise=False).architecture, 64)
    policy.tokens[..., 1:] = False
    policy.sublayers[:, 1:] = False
    add_statistics(bundle, policy, capacity_quantile=0.5)
    return add_double_engines(bundle, usual=[(0, 1, 2), (0, 2), (1,)])


class Requests:
    """What is asked of a device, and what the CPU makes of it."""

    def __init__(self, runtime: Runtime) -> None:
        self.asked: list[tuple[np.ndarray, Policy | None, list[Offsets] | None]] = []
        arch = runtime.architecture
        for turn in range(TURNS):
            for size in SIZES:
                images = random_images(arch, size, 10 * turn + size)
                budgets = [BUDGETS[(turn + image) % len(BUDGETS)] for image in range(size)]
                self.asked.append((images, None, budgets))
            self.asked.append((images, random_policy(arch, size, turn), None))
        self.asked.append((random_images(arch, 64), None, None))
        self.wanted = [runtime.run(images, policy, budget=budgets) for images, policy, budgets in self.asked]


@pytest.fixture(scope="module")
def requests(runtime: Runtime) -> Requests:
    return Requests(runtime)


def assert_all_right(bundle: Path, way: str, requests: Requests, gpu: Gpu) -> None:
    """Every request is answered as on the CPU, by CUDA graphs but for the exact way, and all is freed then."""
    on_gpu = adavit.load(bundle, "tensorrt", trust_engines=True, dispatch=way)
    found = [on_gpu.run(images, policy, budget=budgets) for images, policy, budgets in requests.asked]
    for result, wanted in zip(found, requests.wanted, strict=True):
        assert_same_policy(result.policy, wanted.policy)
        np.testing.assert_allclose(result.logits, wanted.logits, atol=1e-4)
    assert way == EXACT or "launch" in gpu.names()
    del on_gpu
    gc.collect()
    assert not gpu.memory and set(gpu.alive.values()) == {0}


@pytest.mark.parametrize("way", WAYS)
def test_without_a_fault_all_is_right(
    roomy: Callable[..., Path], tight: Path, requests: Requests, gpu: Gpu, way: str
) -> None:
    for bundle in (roomy(), tight):
        assert_all_right(bundle, way, requests, gpu)


# The faults. Each changes one thing.


def no_wait_before_sizes_are_read(patch: Patch) -> None:
    patch.setattr(LaneMemory, "fetch_one", lambda self, name, index: self.fetch(name, name))


def no_wait_at_the_end(patch: Patch) -> None:
    fetch = LaneMemory.fetch_one

    def waiting(self: Any, name: str, index: int) -> None:
        with patch.context() as again:
            again.setattr(LaneMemory, "wait", wait)
            fetch(self, name, index)

    wait = LaneMemory.wait
    patch.setattr(LaneMemory, "fetch_one", waiting)
    patch.setattr(LaneMemory, "wait", lambda self: None)
    patch.setattr(LaneMemory, "times", lambda self: (1.0, 1.0, 1.0))


def places(patch: Patch, change: Callable[[Any, Any, dict[str, int]], dict[str, int]]) -> None:
    """Changes where an engine's inputs and outputs are."""
    original = Runners._places

    def changed(self: Any, key: Any, follows: bool) -> dict[str, int]:
        found = original(self, key, follows)
        return found | change(self._memory.at, key, found)

    patch.setattr(Runners, "_places", changed)


def x_and_y_are_swapped(patch: Patch) -> None:
    places(patch, lambda at, key, found: {"x": found["y"], "y": found["x"]} if "x" in found and "y" in found else {})


def tokens_are_not_passed_on(patch: Patch) -> None:
    places(patch, lambda at, key, found: {"x": at("rows", 0)} if "x" in found else {})


def kept_of_the_block_before(patch: Patch) -> None:
    places(patch, lambda at, key, found: {"kept": at("kept", max(0, key.block - 1))} if "kept" in found else {})


def sizes_of_another_block(patch: Patch) -> None:
    places(patch, lambda at, key, found: {"next_sizes": at("sizes", 0)})


def limits_of_another_block(patch: Patch) -> None:
    places(patch, lambda at, key, found: {"limits": at("limits", 0)})


def numbers_are_something_else(patch: Patch) -> None:
    places(patch, lambda at, key, found: {"numbers": at("sizes", 0)})


def state_is_not_passed_on(patch: Patch) -> None:
    places(patch, lambda at, key, found: {"state": at("state", 0)} if "state" in found else {})


def the_policy_that_is_followed_is_overwritten(patch: Patch) -> None:
    places(patch, lambda at, key, found: {"next_kept": at("kept", min((key.block or 0) + 1, 2))})


def upload_after_the_stem(patch: Patch) -> None:
    upload, run = LaneMemory.upload, Runners.run
    patch.setattr(LaneMemory, "upload", lambda self, last: setattr(self, "late", last))

    def late(self: Any, key: Any, *rest: Any) -> None:
        run(self, key, *rest)
        if key == STEM_GRAPH:
            upload(self._memory, self._memory.late)

    patch.setattr(Runners, "run", late)


def limits_of_the_batch_before(patch: Patch) -> None:
    upload = LaneMemory.upload

    def stale(self: Any, last: str) -> None:
        upload(self, "images" if last == "limits" and self.layout.batch in seen else last)
        seen.add(self.layout.batch)

    seen: set[int] = set()
    patch.setattr(LaneMemory, "upload", stale)


def results_before_the_last_block(patch: Patch) -> None:
    fetch, run = LaneMemory.fetch, Runners.run
    patch.setattr(LaneMemory, "fetch", lambda self, first, last: None)

    def early(self: Any, key: Any, *rest: Any) -> None:
        if key.block == self._depth - 1 and key.part in (None, "decisions"):
            fetch(self._memory, "kept", "logits")
        run(self, key, *rest)

    patch.setattr(Runners, "run", early)


def results_are_not_copied(patch: Patch) -> None:
    def views(self: Any) -> Finished:
        memory = self._memory
        return Finished(memory.logits[0], memory.kept, memory.state[self._arch.depth])

    patch.setattr(DeviceLane, "_results", views)


def copies_on_another_stream(patch: Patch) -> None:
    copy = LaneMemory._copy

    def elsewhere(self: Any, target: int, source: int, size: int, kind: Any, stream: int) -> None:
        if not hasattr(self, "other"):
            self.other = int(self._cuda.call("cudaStreamCreateWithFlags", 1))
        copy(self, target, source, size, kind, self.other if kind == 1 else stream)

    patch.setattr(LaneMemory, "_copy", elsewhere)


def shapes_of_the_size_before(patch: Patch) -> None:
    bind = Runners._bind

    def once(self: Any, key: Any, every_head: bool, *rest: Any) -> None:
        if (key, every_head) not in self._bound:
            bind(self, key, every_head, *rest)

    patch.setattr(Runners, "_bind", once)


def parts_do_not_copy_back(patch: Patch) -> None:
    move = LaneMemory.move
    patch.setattr(LaneMemory, "move", lambda self, name, *rest: move(self, name, *rest) if name != "rows" else None)


def parts_do_not_copy_states_back(patch: Patch) -> None:
    move = LaneMemory.move
    patch.setattr(LaneMemory, "move", lambda self, name, *rest: move(self, name, *rest) if name == "rows" else None)


def conditions_on_the_wrong_size(patch: Patch) -> None:
    patch.setattr(captures, "DECIDES", captures.DECIDES[::-1])


def conditions_are_not_set(patch: Patch) -> None:
    patch.setattr(Recording, "set", lambda self, sizes: None)


def no_graph_is_recorded(patch: Patch) -> None:
    patch.setattr(Runners, "captures", lambda self: False)


def graphs_share_contexts(patch: Patch) -> None:
    new = DeviceLane._new_plan

    def shared(self: Any, *rest: Any) -> Any:
        plan = new(self, *rest)
        plan.runners = self._runners
        return plan

    patch.setattr(DeviceLane, "_new_plan", shared)


def memory_of_graphs_is_freed(patch: Patch) -> None:
    def moved(self: Any, size: int) -> tuple[int, int]:
        if self._scratch:
            self._cuda.call("cudaFree", self._scratch)
        self._scratch_size = max(size, self._scratch_size)
        self._scratch = int(self._cuda.call("cudaMalloc", self._scratch_size))
        return self._scratch, self._scratch_size

    patch.setattr(LaneMemory, "scratch", moved)


def graphs_are_not_freed(patch: Patch) -> None:
    patch.setattr(Executable, "close", lambda self: None)


def images_do_not_run_again(patch: Patch) -> None:
    patch.setattr(BatchDispatcher, "_again", lambda self, *rest: ())


def images_run_again_into_other_rows(patch: Patch) -> None:
    again = BatchDispatcher._again

    def shuffled(self: Any, finished: Finished, over: np.ndarray, *rest: Any) -> Any:
        rooms = again(self, finished, over, *rest)
        finished.logits[over] = finished.logits[over[::-1]]
        return rooms

    patch.setattr(BatchDispatcher, "_again", shuffled)


def images_run_again_with_limits_of_others(patch: Patch) -> None:
    again = BatchDispatcher._again

    def others(self: Any, finished: Any, over: Any, images: Any, limits: np.ndarray, *rest: Any) -> Any:
        return again(self, finished, over, images, np.roll(limits, 1, 1), *rest)

    patch.setattr(BatchDispatcher, "_again", others)


def images_run_again_without_their_heads(patch: Patch) -> None:
    run = Runners.run
    patch.setattr(Runners, "run", lambda self, key, every_head, *rest: run(self, key, False, *rest))


EVERY_WAY = [
    no_wait_at_the_end, x_and_y_are_swapped, kept_of_the_block_before, limits_of_another_block,
    numbers_are_something_else, upload_after_the_stem, limits_of_the_batch_before, results_before_the_last_block,
    results_are_not_copied, copies_on_another_stream, the_policy_that_is_followed_is_overwritten,
]  # fmt: skip
FAULTS = [(fault, way, False) for fault in EVERY_WAY for way in WAYS]
FAULTS += [(fault, EXACT, False) for fault in (no_wait_before_sizes_are_read, shapes_of_the_size_before)]
FAULTS += [(sizes_of_another_block, way, False) for way in (EXACT, CONDITIONAL)]
FAULTS += [(tokens_are_not_passed_on, way, False) for way in (EXACT, CAPACITY)]
FAULTS += [
    (fault, CONDITIONAL, False)
    for fault in (parts_do_not_copy_back, conditions_on_the_wrong_size, conditions_are_not_set)
]
FAULTS += [
    (fault, way, False)
    for fault in (no_graph_is_recorded, graphs_share_contexts, memory_of_graphs_is_freed, graphs_are_not_freed)
    for way in (CAPACITY, CONDITIONAL)
]
FAULTS += [(parts_do_not_copy_states_back, CONDITIONAL, True)]
FAULTS += [
    (fault, way, True)
    for fault in (
        state_is_not_passed_on, images_do_not_run_again, images_run_again_into_other_rows,
        images_run_again_with_limits_of_others, images_run_again_without_their_heads,
    )
    for way in (CAPACITY, CONDITIONAL)
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("fault", "way", "overflows"), FAULTS, ids=[f"{fault.__name__}-{way}" for fault, way, _ in FAULTS]
)
def test_a_fault_is_caught(
    roomy: Callable[..., Path], tight: Path, requests: Requests, gpu: Gpu, monkeypatch: Patch,
    fault: Callable[[Patch], None], way: str, overflows: bool,
) -> None:  # fmt: skip
    fault(monkeypatch)
    with pytest.raises(CAUGHT):
        assert_all_right(tight if overflows else roomy(), way, requests, gpu)


def shared(patch: Patch) -> None:
    take = LanePool.take

    def keeps(self: Any, batch: int) -> Any:
        found = take(self, batch)
        self.spare += [lane for lane in found[:1] if lane is not None]
        return found

    patch.setattr(LanePool, "take", keeps)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", [None, shared])
def test_a_lane_is_of_one_thread(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, monkeypatch: Patch,
    fault: Callable[[Patch], None] | None, way: str,
) -> None:  # fmt: skip
    """One that two use at once gives wrong numbers."""
    on_gpu = adavit.load(roomy(), "tensorrt", trust_engines=True, dispatch=way)
    first, second = (random_images(runtime.architecture, 3, seed) for seed in (1, 2))
    for _ in range(3):
        on_gpu.run(first)
    if fault:
        fault(monkeypatch)
    waits, goes_on, reach = Event(), Event(), gpu.reach

    def held(moment: Any) -> None:
        if not waits.is_set():
            waits.set()
            assert goes_on.wait(60)
        reach(moment)

    monkeypatch.setattr(gpu, "reach", held)

    def both() -> tuple[Result, Result]:
        with ThreadPoolExecutor(1) as pool:
            try:
                future = pool.submit(on_gpu.run, first)
                assert waits.wait(60)
                found = on_gpu.run(second)
            finally:
                goes_on.set()
            return future.result(60), found

    def compare() -> None:
        for result, images in zip(both(), (first, second), strict=True):
            wanted = runtime.run(images)
            assert_same_policy(result.policy, wanted.policy)
            np.testing.assert_allclose(result.logits, wanted.logits, atol=1e-4)

    if fault is None:
        compare()
    else:
        with pytest.raises(CAUGHT):
            compare()
