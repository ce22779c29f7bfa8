"""What calibration sees is what is dispatched, in bounded memory."""

from pathlib import Path

import numpy as np
import pytest
from cases import WIDE, random_images

import adavit
from adavit.bundle.keys import Sublayers
from adavit.bundle.operating_points import Offsets
from adavit.calibration.linear import Sublayer, sublayers_of
from adavit.calibration.recording import Recorder, Reservoir
from adavit.runtime import Runtime

IMAGES = random_images(WIDE, 16, seed=5)


@pytest.fixture(scope="module")
def runtime(wide: tuple[Path, Path]) -> Runtime:
    return adavit.load(wide[0], threads=1, specialise=False)


def recorded(runtime: Runtime, capacity: int = 100, seed: int = 0, naive: bool = False) -> Recorder:
    recorder = Recorder(runtime, capacity, seed, naive)
    for image in IMAGES:
        recorder.run(image)
    return recorder


def test_each_sublayer_keeps_what_its_policy_dispatches(runtime: Runtime) -> None:
    recorder, policy = recorded(runtime), runtime.run(IMAGES).policy
    for sublayer, reservoir in recorder.reservoirs.items():
        block, part = sublayer
        position = Sublayers._fields.index(part)
        reached = np.flatnonzero(policy.sublayers[:, block, position] & policy.heads[:, block].any(1))
        assert [len(rows) for _, rows in reservoir.samples] == policy.tokens[reached, block].sum(1).tolist()
        for image, (key, _) in zip(reached, reservoir.samples, strict=True):
            assert key.block == block
            assert key.sublayers == tuple(policy.sublayers[image, block])
            assert key.heads == tuple(np.flatnonzero(policy.heads[image, block]))


def test_the_first_input_is_the_stems_kept_tokens(runtime: Runtime) -> None:
    stem: list[np.ndarray] = []
    runtime.run(IMAGES[:1], observe=lambda step: stem.append(step.tokens.copy()))
    kept = runtime.run(IMAGES[:1]).policy.tokens[0, 0]
    first = recorded(runtime).reservoirs[Sublayer(0, "attention")].samples[0]
    np.testing.assert_array_equal(first.rows, stem[0][kept])


def test_a_sublayer_without_a_head_does_not_count(wide: tuple[Path, Path]) -> None:
    recorder = recorded(adavit.load(wide[0], threads=1, budget=Offsets(heads=-1000.0), specialise=False))
    for sublayer in sublayers_of(WIDE):  # the first block keeps every head
        assert bool(recorder.seen[sublayer].samples) == bool(recorder.reservoirs[sublayer].offered)
        assert bool(recorder.seen[sublayer].samples) == (sublayer.block == 0)


def test_counts_are_of_what_ran(runtime: Runtime) -> None:
    recorder, policy = recorded(runtime, capacity=2), runtime.run(IMAGES).policy
    assert recorder.images == len(IMAGES) and len(recorder.whole.samples) == 2
    for sublayer, seen in recorder.seen.items():
        reservoir, part = recorder.reservoirs[sublayer], Sublayers._fields.index(sublayer.part)
        reached = policy.sublayers[:, sublayer.block, part] & policy.heads[:, sublayer.block].any(1)
        assert seen.samples == reservoir.offered == reached.sum()
        assert len(reservoir.samples) == min(2, seen.samples)
        assert seen.tokens == policy.tokens[reached, sublayer.block].sum()


def test_naive_calibration_gives_everything_to_everyone(runtime: Runtime) -> None:
    recorder = recorded(runtime, naive=True)
    samples = [sample for kept in recorder.reservoirs.values() for sample in kept.samples]
    assert len(samples) == 2 * WIDE.depth * len(IMAGES)
    assert {len(rows) for _, rows in samples} == {WIDE.tokens}
    assert {key.heads for key, _ in samples} == {tuple(range(WIDE.heads))}


def test_a_reservoir_is_seeded_bounded_and_fair() -> None:
    made: list[int] = []

    def chosen(seed: int, name: str = "a") -> list[int]:
        reservoir = Reservoir[int](10, seed, name)
        for value in range(200):
            reservoir.offer(lambda value=value: made.append(value) or value)
        return reservoir.samples

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    assert chosen(1) != chosen(1, "b")
    assert len(made) < 5 * 100  # only what is taken is made
    mean = np.mean([np.mean(chosen(seed)) for seed in range(200)])
    assert 92 < mean < 107
