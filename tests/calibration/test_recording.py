"""What calibration sees is what is dispatched, in bounded memory."""

from pathlib import Path

import numpy as np
import pytest
from cases import WIDE, random_images

import adavit
from adavit.calibration.linear import unit
from adavit.calibration.recording import Recorder, Reservoir
from adavit.runtime import Runtime
from adavit.bundle.operating_points import Offsets

IMAGES = random_images(WIDE, 16, seed=5)


@pytest.fixture(scope="module")
def runtime(wide: tuple[Path, Path]) -> Runtime:
    return adavit.load(wide[0], threads=1)


def recorded(runtime: Runtime, capacity: int = 100, seed: int = 0, naive: bool = False) -> Recorder:
    recorder = Recorder(runtime, capacity, seed, naive)
    for image in IMAGES:
        recorder.run(image)
    return recorder


def test_each_sublayer_keeps_what_its_policy_dispatches(runtime: Runtime) -> None:
    recorder, policy = recorded(runtime), runtime.run(IMAGES).policy
    for block in range(WIDE.depth):
        for position, kind in enumerate(("attention", "mlp")):
            reached = np.flatnonzero(policy.sublayers[:, block, position] & policy.heads[:, block].any(1))
            samples = recorder.reservoirs[f"blocks.{block}.{kind}"].samples
            assert [len(sample["x"]) for sample in samples] == policy.tokens[reached, block].sum(1).tolist()
            if block >= WIDE.keep:
                masks = [sample["channels"].reshape(WIDE.heads, WIDE.head_width).any(1) for sample in samples]
                assert np.array_equal(masks, policy.heads[reached, block]) or not len(reached)


def test_the_first_input_is_the_stems_kept_tokens(runtime: Runtime) -> None:
    stem: list[np.ndarray] = []
    runtime.run(IMAGES[:1], observe=lambda _, engine, x: stem.append(x.copy()) if engine == "stem" else None)
    kept = runtime.run(IMAGES[:1]).policy.tokens[0, 0]
    np.testing.assert_array_equal(recorded(runtime).reservoirs["blocks.0.attention"].samples[0]["x"], stem[0][kept])


def test_engines_for_sets_of_heads_hide_nothing(runtime: Runtime, wide: tuple[Path, Path]) -> None:
    specialised, plain = adavit.load(wide[0], threads=1), recorded(runtime)
    assert specialised.specialise(runtime.run(IMAGES).policy) > 0
    found = recorded(specialised)
    assert found.seen == plain.seen
    for name, reservoir in plain.reservoirs.items():
        assert [sample.keys() for sample in found.reservoirs[name].samples] == [s.keys() for s in reservoir.samples]


def test_a_sublayer_without_a_head_runs_no_engine(wide: tuple[Path, Path]) -> None:
    recorder = recorded(adavit.load(wide[0], threads=1, budget=Offsets(heads=-1000.0)))
    assert {engine.split(".")[1] for engine in recorder.seen} == {"0"}  # which keeps every head
    assert all(not recorder.reservoirs[f"blocks.1.{kind}"].offered for kind in ("attention", "mlp"))


def test_counts_and_statistics_are_of_what_ran(runtime: Runtime) -> None:
    recorder, policy = recorded(runtime, capacity=2), runtime.run(IMAGES).policy
    offered = {name: reservoir.offered for name, reservoir in recorder.reservoirs.items() if name != "dense"}
    for name, count in offered.items():
        assert sum(seen.samples for engine, seen in recorder.seen.items() if unit(engine) == name) == count
        assert len(recorder.reservoirs[name].samples) == min(2, count)
        block, part = int(name.split(".")[1]), int(name.endswith("mlp"))
        reached = policy.sublayers[:, block, part] & policy.heads[:, block].any(1)
        tokens = sum(seen.tokens for engine, seen in recorder.seen.items() if unit(engine) == name)
        assert tokens == policy.tokens[reached, block].sum()
    statistics = recorder.statistics().to_dict()
    runs = policy.sublayers[:, 1].any(1)
    for kind, masks in (("tokens", policy.tokens), ("heads", policy.heads)):
        wanted = np.unique(masks[runs, 1].sum(1), return_counts=True)
        assert statistics[kind][1] == {str(k): int(n) for k, n in zip(*wanted, strict=True)}
    assert statistics["batch"] == {"1": len(IMAGES)}


def test_naive_calibration_gives_everything_to_everyone(runtime: Runtime) -> None:
    recorder = recorded(runtime, naive=True)
    samples = [sample for name, kept in recorder.reservoirs.items() if name != "dense" for sample in kept.samples]
    assert len(samples) == 2 * WIDE.depth * len(IMAGES)
    assert {len(sample["x"]) for sample in samples} == {WIDE.tokens}
    assert all(sample["channels"].all() for sample in samples if "channels" in sample)


def test_a_reservoir_is_seeded_bounded_and_fair() -> None:
    made: list[int] = []

    def chosen(seed: int, name: str = "a") -> list[int]:
        reservoir = Reservoir(10, seed, name)
        for value in range(200):
            reservoir.offer(lambda value=value: made.append(value) or {"v": np.float32(value)})
        return [int(sample["v"]) for sample in reservoir.samples]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    assert chosen(1) != chosen(1, "b")
    assert len(made) < 5 * 100  # only what is taken is made
    mean = np.mean([np.mean(chosen(seed)) for seed in range(200)])
    assert 92 < mean < 107
