"""Batches that are cut, each image with a budget of its own, as graphs of batches compute them on the CPU."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_reference import batches_on_cpu
from cases import assert_same_policy, random_images, random_policy, tiny
from double import add_statistics

from adavit.bundle.operating_points import Offsets
from adavit.errors import BackendError
from adavit.runtime import Policy, Result, Runtime
from adavit.runtime.backends.onnxruntime.batch import CpuLane
from adavit.runtime.batch import WAYS
from adavit.runtime.batch_dispatcher import Asked
from adavit.runtime.dispatcher import Step, thresholds
from adavit.runtime.finite import NotFiniteError

SOME_HEADS = ((0, 1, 2), (0, 2), (1,))
WAY = pytest.mark.parametrize("way", [*WAYS, "auto"])


@pytest.fixture(scope="module")
def cramped(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with statistics of images that keep next to nothing."""
    policy = Policy.dense(tiny(), 64)
    policy.tokens[..., 1:] = False
    policy.sublayers[:, 1:] = False
    bundle = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("cramped") / "bundle")
    return add_statistics(bundle, policy, capacity_quantile=0.5)


def assert_same(found: Result, wanted: Result) -> None:
    assert_same_policy(found.policy, wanted.policy)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)


def budgets_of(images: int, seed: int) -> list[Offsets]:
    """Some of few, so that they come again, and not in order."""
    source = np.random.default_rng(seed)
    few = [Offsets(), Offsets(50.0, 50.0, 50.0), Offsets(-50.0, -50.0, -50.0), Offsets(1.0, -0.5, 0.5)]
    return [few[number] for number in source.integers(len(few), size=images)]


@pytest.mark.parametrize("heads", [None, SOME_HEADS], ids=["all heads", "some heads"])
@pytest.mark.parametrize("most", [1, 3, 32])
@WAY
def test_batches_are_cut(way: str, most: int, heads: Any, cramped: Path, runtime: Runtime) -> None:
    batches = batches_on_cpu(cramped, way, heads, most)
    for seed, count in enumerate((8, 3, 8)):
        images, budgets = random_images(tiny(), count, seed), budgets_of(count, seed)
        assert_same(batches.run(images, budget=budgets), runtime.run(images, budget=budgets))
        follow = random_policy(tiny(), count, seed)
        assert_same(batches.run(images, follow), runtime.run(images, follow))
        for arguments in ({"budget": budgets}, {"policy": follow}):
            shown, wanted = list[Step](), list[Step]()
            assert_same(
                batches.run(images, observe=noting(shown), **arguments),
                runtime.run(images, observe=noting(wanted), **arguments),
            )
            assert_same_steps(shown, wanted)


def noting(steps: list[Step]) -> Callable[[Step], None]:
    """An observer; tokens are valid until it returns."""
    return lambda step: steps.append(step._replace(tokens=step.tokens.copy()))


def assert_same_steps(found: list[Step], wanted: list[Step]) -> None:
    by_step = {(step.image, step.block): step for step in found}
    assert len(by_step) == len(found) == len(wanted)
    for step in wanted:
        mine = by_step[step.image, step.block]
        np.testing.assert_allclose(mine.tokens, step.tokens, atol=1e-4)
        assert (mine.kept is None) == (step.kept is None)
        if step.kept is not None:
            np.testing.assert_array_equal(mine.kept, step.kept)


@WAY
def test_tables_that_grow_while_others_run(way: str, cramped: Path, runtime: Runtime) -> None:
    batches = batches_on_cpu(cramped, way, most=3)
    asked = [(random_images(tiny(), 1 + seed % 7, seed), budgets_of(1 + seed % 7, seed)) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: batches.run(one[0], budget=one[1]), asked))
    for result, (images, budgets) in zip(found, asked, strict=True):
        assert_same(result, runtime.run(images, budget=budgets))


@pytest.mark.parametrize("way", ["capacity", "conditional"])
def test_room_is_for_the_largest_budget_in_any_order(way: str, cramped: Path) -> None:
    """Once the table of one budget has grown, images at others beside it find room at once."""
    batches, everything, nothing = batches_on_cpu(cramped, way), Offsets(50.0, 50.0, 50.0), Offsets(-50.0, -50.0, -50.0)
    dispatcher: Any = batches.dispatcher
    images = random_images(tiny(), 2)
    for budgets in [[everything] * 2] * 4 + [[nothing, everything], [everything, nothing]]:
        batches.run(images, budget=budgets)
    assert [went.overflowed > 0 for went in dispatcher.ran] == [True] * 3 + [False] * 3


def test_an_image_of_a_later_part_is_named(cramped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, start = random_images(tiny(), 5), CpuLane.start
    images[3, 0, 0, 0] = 7

    def no_numbers(self: Any, given: np.ndarray, *rest: Any) -> None:
        start(self, np.where(given[:, :1, :1, :1] == 7, np.float32(np.nan), given), *rest)

    monkeypatch.setattr(CpuLane, "start", no_numbers)
    with pytest.raises(NotFiniteError, match="on image 3, or its last tokens, are"):
        batches_on_cpu(cramped, most=2).run(images)


def test_thresholds_are_those_of_the_host() -> None:
    """To the last bit: a decision that is as near goes the same way."""
    arch, source = tiny(), np.random.default_rng(0)
    each = [Offsets(*source.normal(size=3).tolist()) for _ in range(200)]
    limits = Asked.of(each, len(each), arch.depth).limits
    for image, offsets in enumerate(each):
        for block, wanted in enumerate(thresholds(offsets, arch)):
            assert set(wanted[1:].tolist()) <= set(limits[block, image].tolist())
        np.testing.assert_array_equal(Asked.of(offsets, 1, arch.depth).limits[:, 0], limits[:, image])


@pytest.mark.parametrize("fails", [{"conditional"}, {"capacity", "conditional"}])
def test_a_way_that_fails_is_left_out(
    fails: set[str], cramped: Path, runtime: Runtime, cache: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """It is tried again by the next process."""
    launch = CpuLane.launch

    def failing(self: Any, images: Any, limits: Any, rooms: Any, way: str) -> None:
        if way in fails:
            raise BackendError("cudaMalloc failed: out of memory")
        launch(self, images, limits, rooms, way)

    monkeypatch.setattr(CpuLane, "launch", failing)
    batches, images = batches_on_cpu(cramped, "auto"), random_images(tiny(), 3)
    for _ in range(2):
        assert_same(batches.run(images), runtime.run(images))
    assert {f"no {way} dispatch for batches of 4: cudaMalloc failed: out of memory" for way in fails} == {
        record.message for record in caplog.records if record.levelname == "WARNING"
    }
    dispatcher: Any = batches.dispatcher
    assert not {went.way for went in dispatcher.ran} & fails
    assert not list(cache.glob("dispatch-*.json"))


def test_where_every_way_fails_it_is_said(cramped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise BackendError("cudaMalloc failed: out of memory")

    monkeypatch.setattr(CpuLane, "start", failing)
    with pytest.raises(BackendError, match="out of memory"):
        batches_on_cpu(cramped, "auto").run(random_images(tiny(), 3))
