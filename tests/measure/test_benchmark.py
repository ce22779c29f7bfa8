"""What a measurement runs, in which order, and what it reports of it."""

from typing import Any

import numpy as np
import pytest
from cases import assert_same_policy, random_images, random_policy, tiny

from adavit.macs import dense_macs
from adavit.measure.benchmark import Measurement, Plan, latency, measure, summarise
from adavit.runtime import Policy, Runtime


class RecordingRuntime:
    """A runtime that notes what it is asked to run."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.backend, self.dispatcher = runtime.backend, runtime.dispatcher
        self.calls: list[tuple[str, np.ndarray, Policy | None]] = []

    def run(self, images: np.ndarray, policy: Policy | None = None) -> Any:
        self.calls.append(("adaptive", images, policy))
        return self.runtime.run(images, policy=policy)

    def run_dense(self, images: np.ndarray) -> Any:
        self.calls.append(("dense", images, None))
        return self.runtime.run_dense(images)


def test_the_dense_twin_alternates_on_the_same_images(runtime: Runtime) -> None:
    recording, images = RecordingRuntime(runtime), random_images(tiny(), 3)
    found = measure(recording, images, Plan(batch=2, iterations=3, warmup=1))  # type: ignore[arg-type]
    assert (len(found.adaptive_ms), len(found.dense_ms)) == (3, 3)
    calls = recording.calls[1:]  # the first call loads the dense twin
    assert [kind for kind, _, _ in calls] == ["adaptive", "dense"] * 4
    for position, wanted in enumerate(([0, 1], [2, 0], [1, 2], [0, 1])):
        for _, given, _ in calls[2 * position : 2 * position + 2]:
            np.testing.assert_array_equal(given, images[wanted])


def test_a_policy_stays_with_its_images(runtime: Runtime) -> None:
    recording, images, policy = RecordingRuntime(runtime), random_images(tiny(), 3), random_policy(tiny(), 3, seed=1)
    measure(recording, images, Plan(batch=2, iterations=2, warmup=0, dense=False), policy)  # type: ignore[arg-type]
    for (kind, _, given), wanted in zip(recording.calls, ([0, 1], [2, 0]), strict=True):
        assert kind == "adaptive"
        assert given is not None
        assert_same_policy(given, policy[np.array(wanted)])


def test_a_measurement_ends_after_its_time(runtime: Runtime) -> None:
    shares: list[float] = []
    plan = Plan(seconds=0.05, warmup=0, dense=False)
    found = measure(runtime, random_images(tiny(), 1), plan, progress=lambda _, share: shares.append(share))
    assert len(found.adaptive_ms) == len(shares) >= 1
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_percentiles() -> None:
    found = latency([float(value) for value in range(101)])
    assert found == {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "mean": 50}


def test_a_short_cycle_is_finished(runtime: Runtime) -> None:
    plan = Plan(batch=2, seconds=0.001, warmup=0, dense=False)
    assert len(measure(runtime, random_images(tiny(), 3), plan).adaptive_ms) % 3 == 0


def test_the_summary_keeps_to_the_definitions(runtime: Runtime) -> None:
    measured = Measurement(adaptive_ms=[1.0, 2.0, 9.0], dense_ms=[4.0, 6.0, 5.0])
    dense = dense_macs(runtime.architecture)
    report = summarise(runtime, Plan(batch=4), measured, dense / 4, {"tokens": 0.5})
    assert report["macs"] == {"executed_mean": dense / 4, "dense": dense}
    assert (report["iterations"], report["usage"]) == (3, {"tokens": 0.5})
    assert (report["speedup"], report["ideal_speedup"], report["efficiency"]) == (2.5, 4.0, 0.625)
    assert report["throughput"] == pytest.approx(1000.0)
    measured.dense_ms.clear()
    report = summarise(runtime, Plan(), measured, dense / 4, {})
    assert report["speedup"] is report["efficiency"] is report["dense"] is None
