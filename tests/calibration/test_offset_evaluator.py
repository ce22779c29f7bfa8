"""What offsets do to images, what is predicted of it, and how much of it runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import export, random_images, random_model, tiny

import adavit
from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.calibration import budgets as calibration
from adavit.calibration import greedy_walk
from adavit.calibration.budgets import calibrate
from adavit.calibration.decisions import shifted, units_of
from adavit.calibration.offset_evaluator import OffsetEvaluator
from adavit.macs import dense_macs
from adavit.runtime import Runtime


def evaluator_of(runtime: Runtime, count: int = 32, labels: bool = True) -> OffsetEvaluator:
    known = np.random.default_rng(0).integers(0, 5, count) if labels else None
    return OffsetEvaluator(runtime, random_images(tiny(), count), known)


@pytest.fixture
def ran(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images that run from here on."""
    counts: list[int] = []
    run = runtime.run

    def counted(images: Any, *given: Any, **named: Any) -> Any:
        counts.append(len(images))
        return run(images, *given, **named)

    monkeypatch.setattr(runtime, "run", counted)
    return counts


@pytest.mark.parametrize("count", [None, 20])
def test_what_a_trial_counts(count: int | None, runtime: Runtime) -> None:
    images, offsets = random_images(tiny(), 32)[:count], Offsets(-0.5, 0.3, 1.0)
    tried = evaluator_of(runtime)
    assert tried.labels is not None
    labels, trained, result = tried.labels[:count], runtime.run(images), runtime.run(images, budget=offsets)
    found = tried.run(offsets, count)
    assert found.macs == pytest.approx(result.macs.mean() / dense_macs(runtime.architecture))
    assert found.accuracy == (result.logits.argmax(1) == labels).mean()
    assert found.agreement == (result.logits.argmax(1) == trained.logits.argmax(1)).mean()
    assert found.usage == pytest.approx(result.policy.usage())
    assert tried.trained.agreement == 1
    unlabelled = evaluator_of(runtime, labels=False).run(offsets, count)
    assert unlabelled.accuracy is None
    exact = np.exp(result.logits.astype(np.float64))
    for wanted, outcome in ((labels, found), (trained.logits.argmax(1), unlabelled)):
        scores = (exact / exact.sum(1, keepdims=True))[np.arange(len(images)), wanted]
        np.testing.assert_allclose(outcome.scores, scores, rtol=1e-6)
        assert outcome.score == pytest.approx(scores.mean())


def test_an_image_runs_once_with_the_same_offsets(runtime: Runtime, ran: list[int]) -> None:
    tried = evaluator_of(runtime, 100)
    assert tried.trained is tried.trained
    del ran[:]
    for count, more in ((40, 40), (80, 40), (60, 0), (None, 20), (None, 0)):
        assert tried.run(Offsets(1.0), count) == tried.run(Offsets(1.0), count)
        assert sum(ran) == more
        del ran[:]
    again = evaluator_of(runtime, 100).run(Offsets(1.0))
    assert tried.run(Offsets(1.0)) == again
    tried.record(Offsets(2.0), 50)
    del ran[:]
    tried.run(Offsets(2.0), 50)  # what recorded has run
    assert not ran


@pytest.mark.parametrize("by", [-0.4, 0.4])
def test_only_images_whose_decisions_change_run(by: float, runtime: Runtime, ran: list[int]) -> None:
    tried, base, depth = evaluator_of(runtime), Offsets(0.2, -0.1, 0.1), tiny().depth
    recorded = tried.record(base, 20)
    skipped = 0
    for unit in units_of(tiny()):
        offsets = shifted(base, depth, {unit: by})
        del ran[:]
        found = tried.run(offsets, 20, recorded)
        skipped += 20 - sum(ran)
        wanted = evaluator_of(runtime).run(offsets, 20)
        assert found == wanted
        np.testing.assert_array_equal(found.scores, wanted.scores)
    assert skipped > 20


@pytest.mark.parametrize("missing", [(), ("token_policy",), ("head_policy",), ("sublayer_policy",)])
def test_predictions_are_exact_where_decisions_were_recorded_and_in_the_last_block(
    missing: tuple[str, ...], tmp_path: Path
) -> None:
    arch = tiny(**dict.fromkeys(missing, False))
    tried = evaluator_of(adavit.load(export(random_model(arch), tmp_path), threads=1))
    base = Offsets(0.2, -0.1, 0.1)
    recorded = tried.record(base, 32)
    assert recorded.macs(base) == pytest.approx(tried.run(base).macs)
    assert recorded.macs(base, 20) == pytest.approx(tried.run(base, 20).macs)
    assert not recorded.changed(base).any()
    for unit in units_of(arch):
        low, high = recorded.reach(unit)
        assert low <= 0 <= high
        for by in (low, low / 2, high / 2, high):
            offsets = shifted(base, arch.depth, {unit: by})
            if unit[1] == arch.depth - 1:
                assert recorded.macs(offsets) == pytest.approx(tried.run(offsets).macs)
        for end, share in ((low, 0.0), (high, 1.0)):
            kind, block = unit
            assert recorded.kept(shifted(base, arch.depth, {unit: end}))[kind][:, block].mean() == share


@pytest.mark.parametrize("labels", [True, False])
def test_a_model_meets_its_budgets(labels: bool, runtime: Runtime, ran: list[int]) -> None:
    tried = evaluator_of(runtime, labels=labels)
    least, trained = tried.run(Offsets(-99, -99, -99)).macs, tried.trained.macs
    asked = [0.5 * least + 0.5 * trained, 0.6 * trained + 0.4]
    del ran[:]
    shares: list[float] = []
    found = calibrate(tried, asked, shares.append)
    assert sum(ran) < 200 * 32  # and no more where images are many: they are compared on some of them
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert TRAINED in {point.offsets for point in found.points}
    for point in found.points:
        assert point.measured["macs"] == pytest.approx(point.budget, rel=calibration.FAR)
        assert tried.run(point.offsets).macs == point.measured["macs"]
        assert ("accuracy" in point.measured) == labels
    assert {point.budget for point in found.points} >= set(asked)


def test_walks_run_some_of_many_images(runtime: Runtime, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_walk, "FIRST", 12)
    tried = evaluator_of(runtime, 200)
    assert tried.trained.agreement == 1
    del ran[:]
    stepping = greedy_walk.GreedyWalk(tried, TRAINED, -1, 0.02, greedy_walk.moves_by_unit(runtime.architecture), 24)
    assert stepping.step()
    assert sum(ran) <= 24 * (len(units_of(tiny())) + 2)


@pytest.mark.parametrize("missing", ["token_policy", "head_policy", "sublayer_policy"])
def test_models_that_lack_a_policy(missing: str, tmp_path: Path) -> None:
    runtime = adavit.load(export(random_model(tiny(**{missing: False})), tmp_path), threads=1)
    tried = evaluator_of(runtime)
    budget = 0.5 * tried.trained.macs + 0.5 * tried.run(Offsets(*[9.0] * 3)).macs
    points = calibrate(tried, [budget]).points
    assert points[-1].measured["macs"] == pytest.approx(budget, rel=calibration.FAR)
    kind = {"token_policy": "tokens", "head_policy": "heads", "sublayer_policy": "sublayers"}[missing]
    assert all(not np.any(getattr(point.offsets, kind)) for point in points)
