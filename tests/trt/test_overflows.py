"""Images for which there is no room, or whose heads engines lack, run again: results are exact all the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import random_images, random_policy
from double import Gpu, add_double_engines, add_statistics
from driving import FLAVOURS, WAY, assert_all_freed, assert_same, counted, on_device, ran

from adavit.bundle.operating_points import Offsets
from adavit.runtime import Policy, Runtime


@WAY
def test_a_batch_with_overflows_is_one_exact_pass_more(bundle: Path, runtime: Runtime, gpu: Gpu, way: str) -> None:
    arch = runtime.architecture
    add_double_engines(add_statistics(bundle, Policy.dense(arch, 16)), max_batch=32, usual=[(0, 1, 2), (0,), (1,)])
    on_gpu = on_device(bundle, way)
    for batch in (1, 4, 9, 32):
        images = random_images(arch, batch, batch)
        for _ in range(4):
            wanted = runtime.run(images)
            ran(on_gpu)
            found = counted(gpu, lambda: assert_same(on_gpu.run(images), wanted))  # noqa: B023
        (went,) = ran(on_gpu)
        unusual = np.delete(wanted.policy.heads[:, 1], 0, 1).any(1), wanted.policy.heads[:, 2, ::2].any(1)
        runs = wanted.policy.sublayers.any(2)
        wants = (unusual[0] & runs[:, 1]) | (unusual[1] & runs[:, 2])
        assert went.overflowed == wants.sum()
        exact = arch.depth + 1
        passes = 1 + bool(wants.any())
        if way == "exact":
            assert found["run"] == found["synchronise"] == passes * exact
            assert found["upload"] == passes
        else:
            assert found["launch"] == 1
            assert found["run"] == (passes - 1) * exact
            assert found["synchronise"] == 1 + (passes - 1) * exact


def cramped(bundle: Path, runtime: Runtime, flavour: str = "tensorrt", **engines: Any) -> Path:
    """The bundle with statistics of images that keep next to nothing."""
    policy = Policy.dense(runtime.architecture, 64)
    policy.tokens[..., 1:] = False
    policy.sublayers[:, 1:] = False
    return add_double_engines(add_statistics(bundle, policy, capacity_quantile=0.5), flavour, **engines)


@FLAVOURS
@pytest.mark.parametrize("way", ["capacity", "conditional"])
def test_images_for_which_there_is_no_room_run_again(
    bundle: Path, runtime: Runtime, gpu: Gpu, way: str, flavour: str
) -> None:
    on_gpu = on_device(cramped(bundle, runtime, flavour), way, flavour)
    overflowed, rooms = [], []
    batches = [random_images(runtime.architecture, 4, seed) for seed in range(3)]
    for images in 4 * batches:
        assert_same(on_gpu.run(images), runtime.run(images))
        (went,) = ran(on_gpu)
        overflowed.append(went.overflowed)
        rooms.append(went.rooms)
        assert (went.way, went.images, bool(went.again)) == (way, 4, bool(went.overflowed))
    assert overflowed[0], "the table was made for less"
    assert not any(overflowed[6:]), "it has grown"
    assert len(set(rooms)) > 1
    assert 1 <= gpu.alive["exec"] <= len(set(rooms)), "at most one graph of each"
    del on_gpu
    assert_all_freed(gpu)


def test_some_images_of_a_batch_run_again(bundle: Path, runtime: Runtime, gpu: Gpu) -> None:
    """Their results are put where they belong; those of the others stay."""
    on_gpu = on_device(cramped(bundle, runtime), "capacity")
    images, budgets = random_images(runtime.architecture, 4), [Offsets(-50, -50, -50), Offsets(50, 50, 50)] * 2
    assert_same(on_gpu.run(images, budget=budgets), runtime.run(images, budget=budgets))
    (went,) = ran(on_gpu)
    assert went.overflowed == 3, "the third finds no room behind the second"


@WAY
@pytest.mark.parametrize("turns", [1, 4])
def test_images_that_want_unusual_heads_run_again(
    bundle: Path, runtime: Runtime, gpu: Gpu, way: str, turns: int
) -> None:
    arch = runtime.architecture
    add_double_engines(add_statistics(bundle, Policy.dense(arch, 16)), usual=[(0, 1, 2), (0, 2), (1,)])
    on_gpu, again = on_device(bundle, way), 0
    for seed in range(turns):
        images, policy = random_images(arch, 6, seed), random_policy(arch, 6, seed)
        assert_same(on_gpu.run(images), runtime.run(images))
        assert_same(on_gpu.run(images, policy), runtime.run(images, policy))
        shown: list[Any] = []
        assert_same(on_gpu.run(images, observe=shown.append), runtime.run(images))
        assert len(shown) == 6 * (arch.depth + 1), "who looks on sees every image once"
        again += sum(batch.overflowed for batch in ran(on_gpu))
    assert again
    del on_gpu
    assert_all_freed(gpu)


def test_a_lane_keeps_some_graphs(bundle: Path, runtime: Runtime, gpu: Gpu) -> None:
    """Of kinds of batches that come again and again, also in turns; the least used go."""
    on_gpu = on_device(cramped(bundle, runtime, max_batch=16), "capacity")
    for batch in range(1, 13):
        for _ in range(3):
            on_gpu.run(random_images(runtime.architecture, batch))
    assert gpu.alive["exec"] and gpu.names("graph freed")
    assert gpu.alive["exec"] <= 8 * 4, "eight in each of four lanes at most"
    del on_gpu
    assert_all_freed(gpu)
