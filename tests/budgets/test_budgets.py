"""The search for operating points: on a landscape that is known, and on a model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import export, picture, pictures_in, quiet, random_images, random_model, read_config, tiny, write_config
from hypothesis import given, settings
from hypothesis import strategies as st

import adavit
from adavit.budget_options import BudgetOptions
from adavit.calibration import budgets as calibration
from adavit.calibration import choose
from adavit.calibration import trial as module
from adavit.calibration.budgets import add_budgets, calibrate
from adavit.calibration.trial import Outcome, Trial
from adavit.calibration.walk import EVEN_STEP, STEP, Stop, Way, walk
from adavit.errors import BundleError, InputError
from adavit.runtime import Runtime
from adavit.runtime.budget import TRAINED, Budgets, Offsets, OperatingPoint

KINDS = ("tokens", "heads", "sublayers")


class Landscape:
    """Stands for images: MACs and score are smooth functions of the offsets, on any scale of logits.

    What a kind keeps is the mean of what it keeps in the blocks that decide on it.

    Args:
        scales: of each kind's logits.
        worth: score that each kind loses while the share it keeps falls to zero.
        balance: score lost where the kinds do not keep the same share.
    """

    labels = None

    def __init__(self, scales: dict[str, float], worth: dict[str, float], balance: float = 0) -> None:
        self.scales, self.worth, self.balance = scales, worth, balance
        self.runtime: Any = type("Known", (), {"architecture": tiny()})
        self.tried = 0
        self.trained = self.run(TRAINED)

    def kept(self, offsets: Offsets) -> dict[str, float]:
        arch = self.runtime.architecture
        adapts = [True] * arch.depth, *([arch.adapts_heads(block) for block in range(arch.depth)],) * 2
        chosen = (np.asarray(v)[a] for v, a in zip(offsets.by_block(arch.depth), adapts, strict=True))
        return {k: float((1 / (1 + np.exp(-v / self.scales[k]))).mean()) for k, v in zip(KINDS, chosen, strict=True)}

    def run(self, offsets: Offsets, count: int | None = None) -> Outcome:
        self.tried += 1
        with np.errstate(over="ignore"):
            kept = self.kept(offsets)
        macs = 0.1 + 0.9 * (sum(kept.values()) / 3)
        score = 1 - sum(self.worth[kind] * (1 - kept[kind]) ** 2 for kind in KINDS)
        score -= self.balance * float(np.std(list(kept.values())))
        return Outcome(macs, score, score, None, kept)

    search = run

    def size(self, offsets: Offsets) -> Outcome:
        """Few images are run for this, so that it does not count."""
        self.tried -= 1
        return self.run(offsets)

    def __len__(self) -> int:
        return 100


SCALES = [dict.fromkeys(KINDS, 1.0), {"tokens": 0.05, "heads": 1.0, "sublayers": 30.0}]


@pytest.mark.parametrize("scales", SCALES, ids=["alike", "different"])
@pytest.mark.parametrize("dear", KINDS)
def test_budgets_are_met_where_it_costs_least(dear: str, scales: dict[str, float]) -> None:
    land = Landscape(scales, {kind: 10.0 if kind == dear else 1.0 for kind in KINDS})
    found = calibrate(land, [0.25, 0.4, 0.7, 0.9])  # type: ignore[arg-type]
    for budget in (0.25, 0.4, 0.7, 0.9):
        point = next(point for point in found.points if point.budget == budget)
        assert point.measured["macs"] == pytest.approx(budget, rel=calibration.CLOSE)
        kept = land.kept(point.offsets)
        assert kept[dear] > max(kept.values()) - 0.05
        # No worse than the same offset for all kinds, in units of their scales, at as many MACs.
        level = (budget - 0.1) / 0.9
        assert point.measured["agreement"] >= 1 - 12 * (1 - level) ** 2 - 0.02
    assert land.tried < 700


def test_kinds_that_need_each_other_move_together() -> None:
    land = Landscape(SCALES[0], dict.fromkeys(KINDS, 1.0), balance=20.0)
    for point in calibrate(land, [0.25, 0.4, 0.7, 0.9]).points:  # type: ignore[arg-type]
        kept = land.kept(point.offsets).values()
        assert max(kept) - min(kept) < 0.01


class Trap(Landscape):
    """Letting one kind go ahead pays at first, and costs much at small budgets, when offsets cannot turn back."""

    def run(self, offsets: Offsets, count: int | None = None) -> Outcome:
        found = super().run(offsets)
        spread = max(found.usage.values()) - min(found.usage.values())
        score = found.macs + (0.1 * spread if found.macs > 0.4 else -spread)
        return Outcome(found.macs, score, score, None, found.usage)

    search = size = run


def test_what_pays_at_first_does_not_spoil_the_end() -> None:
    trap = Trap(SCALES[0], dict.fromkeys(KINDS, 1.0))
    greedy = walk(trap, 0.25, 0.8)  # type: ignore[arg-type]
    position = np.interp(0.25, [stop.outcome.macs for stop in greedy.stops], range(len(greedy.stops)))
    assert trap.run(greedy.offsets(float(position))).score < 0.1
    first, *_ = calibrate(trap, [0.25, 0.5]).points  # type: ignore[arg-type]
    assert first.measured["agreement"] > first.budget - 0.01


@given(st.tuples(*[st.floats(0.3, 3)] * 3), st.tuples(*[st.floats(0.1, 10)] * 3), st.floats(0, 10))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_points_are_no_worse_than_the_same_offset_for_all(scales: Any, worth: Any, balance: float) -> None:
    land = Landscape(dict(zip(KINDS, scales, strict=True)), dict(zip(KINDS, worth, strict=True)), balance)
    asked, trained = [0.25, 0.4, 0.7, 0.9], land.trained.score
    points = calibrate(land, asked).points  # type: ignore[arg-type]
    for point in (point for point in points if point.budget in asked):
        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            even = land.run(Offsets(middle, middle, middle))
            low, high = (middle, high) if even.macs < point.measured["macs"] else (low, middle)
        tolerance = 0.02 + 0.1 * abs(trained - even.agreement)  # scores are compared at nearly equal MACs
        assert point.measured["agreement"] >= even.agreement - tolerance


class Unsure(Landscape):
    """Keeping more of one thing than of another seems to gain a little, more with some images than with others."""

    def __init__(self, lead: float, noise: float) -> None:
        self.gains = lead + np.where(np.arange(len(self)) % 2, noise, -noise)
        super().__init__(SCALES[0], dict.fromkeys(KINDS, 0.0))

    def run(self, offsets: Offsets, count: int | None = None) -> Outcome:
        scores = np.full(len(self), 0.5) + (0 if even(offsets) else self.gains)
        return replace(super().run(offsets), score=scores.mean(), scores=scores)

    search = size = run


def even(offsets: Offsets) -> bool:
    """Whether all that a tiny model decides is shifted alike."""
    tokens, heads, sublayers = offsets.by_block(tiny().depth)
    return len({*tokens, *heads[1:], *sublayers[1:]}) == 1


@pytest.mark.parametrize(("lead", "taken"), [(0.02, True), (0.008, False), (-0.008, False)])
def test_what_may_be_luck_is_not_taken(lead: float, taken: bool) -> None:
    land: Any = Unsure(lead, noise=0.1)  # of 100 images: a standard error of 0.01
    assert {even(stop.offsets) for stop in walk(land, 0.3, 0.8).stops if stop.offsets != TRAINED} == {not taken}
    points = {point.budget: point.offsets for point in calibrate(land, [0.3, 0.8]).points}
    assert {even(points[budget]) for budget in (0.3, 0.8)} == {not taken}


@pytest.mark.parametrize(("lead", "taken"), [(0.02, True), (0.008, False)])
def test_what_may_be_luck_at_one_budget_is_not_taken_to_another(lead: float, taken: bool) -> None:
    land: Any = Unsure(lead, noise=0.1)
    uneven, alike = (choose._moved(land, offsets, 0.4) for offsets in (Offsets(1.0, -2.0, 1.0), TRAINED))
    assert uneven is not None
    assert alike is not None
    level = choose._moved(land, TRAINED, 0.5)
    assert level is not None
    found = choose.spread(land, {0.4: uneven, 0.5: level})
    assert even(found[0.5].offsets) == (not taken)
    again = choose.spread(land, {0.4: alike, 0.5: level})
    assert even(again[0.4].offsets)


def test_where_none_is_surely_better_the_trained_policy_is_moved_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    land: Any = Unsure(0.008, noise=0.1)
    places = [Offsets(-2.0, -4.0, -1.0), TRAINED, Offsets(2.0, 4.0, 1.0)]
    way = Way(tuple(Stop(offsets, land.run(offsets)) for offsets in places))
    monkeypatch.setattr(choose, "walk", lambda *_: way)
    assert {even(stop.offsets) for stop in choose.best_stops(land, [0.3, 0.8]).values()} == {True}


def test_doubt_is_the_standard_error_of_the_difference() -> None:
    scores = np.random.default_rng(0).random((2, 50))
    first, second = (Outcome(macs, s.mean(), 1, None, {}, s) for macs, s in zip((0.5, 0.4), scores, strict=True))
    error = np.std(scores[1] - scores[0]) / 50**0.5
    assert first.doubt(second) == second.doubt(first) == pytest.approx(error)
    assert first.doubt(first) == first.doubt(replace(second, scores=None)) == 0
    won = scores[1].mean() - scores[0].mean()
    assert Stop(TRAINED, second).worth(Stop(TRAINED, first), -1) == pytest.approx((won - error) / 0.1)
    assert Stop(TRAINED, first).worth(Stop(TRAINED, second), +1) == pytest.approx((-won - error) / 0.1)


class Noisy(Landscape):
    """The part of the images that the walk runs takes less MACs than all of them."""

    def search(self, offsets: Offsets) -> Outcome:
        return replace(found := self.run(offsets), macs=found.macs * self.part)

    size = search

    def __init__(self, part: float) -> None:
        self.part = part
        super().__init__(SCALES[0], dict.fromkeys(KINDS, 1.0))


def test_budgets_at_the_ends_are_met_although_the_walk_runs_few_images() -> None:
    for part, budget in ((0.99, 0.25), (1.01, 0.9)):
        points = calibrate(Noisy(part), [budget]).points  # type: ignore[arg-type]
        point = next(point for point in points if point.budget == budget)
        assert point.measured["macs"] == pytest.approx(budget, rel=calibration.FAR)


def test_a_part_that_is_far_off_is_seen_through() -> None:
    point = calibrate(Noisy(0.5), [0.28]).points[0]  # type: ignore[arg-type]
    assert point.measured["macs"] == pytest.approx(0.28, rel=calibration.FAR)


@pytest.mark.parametrize("part", [0.7, 0.97, 1.03, 1.3])
@pytest.mark.parametrize("level", [0.2, 0.35, 0.45, 0.5, 0.65, 0.75, 0.95])
def test_the_trained_policy_is_moved_to_any_budget_although_few_images_differ_from_all(
    part: float, level: float
) -> None:
    found = choose._moved(Noisy(part), TRAINED, level)  # type: ignore[arg-type]
    assert found is not None
    assert found.outcome.macs == pytest.approx(level, rel=choose.CLOSE)


class Bent(Landscape):
    """Few images take less than all, at small budgets more so."""

    def size(self, offsets: Offsets) -> Outcome:
        return replace(found := super().size(offsets), macs=found.macs**1.05)


@pytest.mark.parametrize("level", [0.2, 0.35, 0.5, 0.75])
def test_what_few_images_tell_is_put_right_on_the_way(level: float) -> None:
    found = choose._moved(Bent(SCALES[0], dict.fromkeys(KINDS, 1.0)), TRAINED, level)  # type: ignore[arg-type]
    assert found is not None
    assert found.outcome.macs == pytest.approx(level, rel=choose.CLOSE)


class Partial(Landscape):
    """Few images decide on tokens, but all together do not."""

    def run(self, offsets: Offsets, count: int | None = None) -> Outcome:
        return super().run(replace(offsets, tokens=0.0))

    search = run

    def size(self, offsets: Offsets) -> Outcome:
        return super().run(offsets)


def test_a_step_that_goes_no_further_is_none() -> None:
    land: Any = Partial(SCALES[0], dict.fromkeys(KINDS, 1.0))
    stops = walk(land, 0.45, 0.65).stops
    assert min(np.diff([stop.outcome.macs for stop in stops])) > 0
    assert (stops[0].outcome.macs, stops[-1].outcome.macs) == pytest.approx((0.45, 0.65), abs=0.03)


class Gap(Landscape):
    """MACs between two values are never taken."""

    def run(self, offsets: Offsets, count: int | None = None) -> Outcome:
        found = super().run(offsets)
        return replace(found, macs=found.macs if not 0.3 < found.macs < 0.5 else 0.3)

    search = size = run


def test_a_budget_that_nothing_comes_near_to_is_an_error() -> None:
    gap = Gap(SCALES[0], dict.fromkeys(KINDS, 1.0))
    with pytest.raises(InputError, match=r"a budget of 0\.4 cannot be met: the nearest found is 0\.(3|5)"):
        calibrate(gap, [0.28, 0.4])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a budget of 0\.32 cannot be met: the nearest found is 0\.3"):
        calibrate(gap, [0.28, 0.32])  # type: ignore[arg-type]
    assert [point.budget for point in calibrate(gap, [0.28, 0.52]).points if point.budget in (0.28, 0.52)]


def test_the_trained_policy_is_a_point_and_points_ascend() -> None:
    land = Landscape(SCALES[0], dict.fromkeys(KINDS, 1.0))
    found = calibrate(land, [0.8, 0.3])  # type: ignore[arg-type]
    assert found.trained.budget == pytest.approx(0.55)
    assert found.trained.measured["macs"] == land.trained.macs
    asked = [point.budget for point in found.points]
    assert asked == sorted(set(asked))
    assert {0.3, 0.8} < set(asked)
    assert len(found.points) >= 5  # more between each two, for interpolation
    assert Budgets.from_dict(found.to_dict(), tiny().depth) == found
    for budget in np.linspace(0.3, 0.8, 21):
        assert land.run(found.offsets(budget)).macs == pytest.approx(budget, rel=0.015)


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_what_loses_nothing_is_given_up_for_what_gains(budget: float) -> None:
    land = Landscape(SCALES[0], {"tokens": 0.0, "heads": 1.0, "sublayers": 1.0})
    point = next(p for p in calibrate(land, [0.3, budget]).points if p.budget == budget)  # type: ignore[arg-type]
    kept, level = land.kept(point.offsets), (budget - 0.1) / 0.9
    assert kept["tokens"] < 0.5 < min(kept["heads"], kept["sublayers"])
    even = 1 - 2 * (1 - level) ** 2  # the same offset for all, whose kinds keep as much each
    assert point.measured["agreement"] > even + 0.5 * (1 - even)


@pytest.mark.parametrize("good", [0, 1, 2])
def test_what_is_good_at_a_budget_is_tried_at_all_others(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    land: Any = Landscape(SCALES[0], {"tokens": 1.0, "heads": 10.0, "sublayers": 1.0})
    levels = [0.3, 0.5, 0.7]
    keeps, drops = Offsets(-2.0, 2.0, -2.0), Offsets(1.0, -2.0, 1.0)  # the heads, which are dear
    before = {level: choose._moved(land, keeps if level == levels[good] else drops, level) for level in levels}
    after = choose.spread(land, {level: stop for level, stop in before.items() if stop})
    monkeypatch.setattr(choose, "_levels", lambda asked: asked)
    monkeypatch.setattr(choose, "_candidates", lambda trial, path, level: [before[level]])
    assert choose.best_stops(land, levels) == after
    wanted = [choose._moved(land, keeps, level) for level in levels]
    for level, found, best in zip(levels, after.values(), wanted, strict=True):
        assert best is not None
        assert found.outcome.macs == pytest.approx(level, rel=choose.CLOSE)
        assert found.outcome.score == pytest.approx(best.outcome.score, abs=0.01)


def test_a_budget_of_the_trained_policy_is_the_trained_policy() -> None:
    land = Landscape(SCALES[0], dict.fromkeys(KINDS, 1.0))
    (point,) = calibrate(land, [0.551]).points  # type: ignore[arg-type]
    assert (point.budget, point.offsets) == (0.551, TRAINED)
    with pytest.raises(InputError, match=r"budgets of 0.55 and 0.551 are all what the trained policy takes \(0.5500\)"):
        calibrate(land, [0.55, 0.3, 0.551])  # type: ignore[arg-type]


@pytest.mark.parametrize("zeros", [TRAINED, Offsets(*[(0.0,) * tiny().depth] * 3)], ids=["trained", "as good as"])
def test_points_that_come_upon_the_trained_policy_leave_one_of_it(
    zeros: Offsets, monkeypatch: pytest.MonkeyPatch
) -> None:
    land = Landscape(SCALES[0], dict.fromkeys(KINDS, 1.0))
    again = calibration.Stop(zeros, land.trained)
    made = calibration.best_stops
    monkeypatch.setattr(calibration, "best_stops", lambda *given: {0.54: again, **made(*given), 0.56: again})
    monkeypatch.setattr(calibration, "_astray", lambda *_: OperatingPoint(0.55, zeros, {}))
    found = calibrate(land, [0.3, 0.8])  # type: ignore[arg-type]
    assert Budgets.from_dict(found.to_dict(), tiny().depth) == found
    assert found.trained.budget == pytest.approx(0.55)


def test_a_model_without_policies(tmp_path: Path) -> None:
    none = dict.fromkeys(("token_policy", "head_policy", "sublayer_policy"), False)
    runtime = adavit.load(export(random_model(tiny(**none)), tmp_path), threads=1)
    with pytest.raises(InputError, match="this model has no policies"):
        calibrate(trial(runtime), [1.0])


def test_steps_are_about_a_step_and_ends_are_reached() -> None:
    land = Landscape(SCALES[1], dict.fromkeys(KINDS, 1.0))
    macs = np.array([stop.outcome.macs for stop in walk(land, 0.11, 0.99).stops])  # type: ignore[arg-type]
    steps = np.diff(macs)
    assert (steps > 0).all()
    assert steps.max() <= 1.7 * EVEN_STEP
    assert np.median(steps) <= 1.7 * STEP
    assert macs[0] < 0.12
    assert macs[-1] > 0.98
    assert land.tried < 400


@pytest.mark.parametrize("budget", [0.05, 0.0999])
def test_a_budget_out_of_reach(budget: float) -> None:
    land = Landscape(SCALES[0], dict.fromkeys(KINDS, 1.0))
    with pytest.raises(InputError, match=r"out of reach: this model's policies can set the MACs from 0\.100 to 1\.000"):
        calibrate(land, [budget])  # type: ignore[arg-type]


def trial(runtime: Runtime, count: int = 48, labels: bool = True, progress: Any = quiet) -> Trial:
    known = np.random.default_rng(0).integers(0, 5, count) if labels else None
    return Trial(runtime, random_images(tiny(), count), known, progress)


@pytest.mark.parametrize("count", [None, 40])
def test_what_a_trial_counts(count: int | None, runtime: Runtime) -> None:
    images, offsets = random_images(tiny(), 48)[:count], Offsets(-0.5, 0.3, 1.0)
    tried = trial(runtime)
    assert tried.labels is not None
    labels, trained, result = tried.labels[:count], runtime.run(images), runtime.run(images, budget=offsets)
    found = tried.run(offsets, count)
    dense = adavit.Policy.dense(tiny(), 1)
    assert found.macs == pytest.approx(result.macs.mean() / runtime.run(images[:1], policy=dense).macs[0])
    assert found.accuracy == (result.logits.argmax(1) == labels).mean()
    assert found.agreement == (result.logits.argmax(1) == trained.logits.argmax(1)).mean()
    assert found.usage == pytest.approx(result.policy.usage())
    assert tried.trained.agreement == 1
    unlabelled = trial(runtime, labels=False).run(offsets, count)
    assert unlabelled.accuracy is None
    exact = np.exp(result.logits.astype(np.float64))
    for wanted, outcome in ((labels, found), (trained.logits.argmax(1), unlabelled)):
        scores = (exact / exact.sum(1, keepdims=True))[np.arange(len(images)), wanted]
        np.testing.assert_allclose(outcome.scores, scores, rtol=1e-6)
        assert outcome.score == pytest.approx(scores.mean())


def test_offsets_are_tried_once_and_on_no_more_images_than_it_takes(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[float] = []
    tried = trial(runtime, 100, progress=lambda _, share: ran.append(share))
    monkeypatch.setattr(module, "SEARCHED", 80)
    monkeypatch.setattr(module, "SIZED", 40)
    for ask, batches in ((tried.run, 4), (tried.search, 3), (tried.size, 2)):
        del ran[:]
        first = ask(Offsets(1.0))
        assert ask(Offsets(1.0)) is first
        assert (len(ran), ran[-1]) == (batches, 1.0)


@pytest.mark.parametrize("labels", [True, False])
def test_a_model_meets_its_budgets(labels: bool, runtime: Runtime) -> None:
    tried = trial(runtime, labels=labels)
    least, trained = tried.run(Offsets(-99, -99, -99)).macs, tried.trained.macs
    asked = [0.5 * least + 0.5 * trained, 0.6 * trained + 0.4]
    found = calibrate(tried, asked)
    for point in found.points:
        assert point.measured["macs"] == pytest.approx(point.budget, rel=calibration.FAR)
        assert tried.run(point.offsets).macs == point.measured["macs"]
        assert ("accuracy" in point.measured) == labels
    assert {point.budget for point in found.points} >= set(asked)


@pytest.mark.parametrize("missing", ["token_policy", "head_policy", "sublayer_policy"])
def test_models_that_lack_a_policy(missing: str, tmp_path: Path) -> None:
    runtime = adavit.load(export(random_model(tiny(**{missing: False})), tmp_path), threads=1)
    tried = trial(runtime)
    budget = 0.5 * tried.trained.macs + 0.5 * tried.run(Offsets(*[9.0] * 3)).macs
    points = calibrate(tried, [budget]).points
    assert points[-1].measured["macs"] == pytest.approx(budget, rel=calibration.FAR)
    kind = {"token_policy": "tokens", "head_policy": "heads", "sublayer_policy": "sublayers"}[missing]
    assert all(not np.any(getattr(point.offsets, kind)) for point in points)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in folders that carry labels of the tiny bundle."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(24):
        path = folder / ("bee", "dog", "elk")[seed % 3] / f"{seed}.png"
        path.parent.mkdir(exist_ok=True)
        picture(seed).save(path)
    return folder


def middle(bundle: Path, photos: Path) -> float:
    """A budget below the trained policy's that the pictures can meet."""
    runtime = adavit.load(bundle, threads=1)
    tried, _ = Trial.of_files(runtime, (photos,), quiet)
    return round(0.4 * tried.run(Offsets(-99, -99, -99)).macs + 0.6 * tried.trained.macs, 3)


def test_points_are_written_into_the_bundle(bundle: Path, photos: Path) -> None:
    budget = middle(bundle, photos)
    before = read_config(bundle)
    files = sorted(path.relative_to(bundle) for path in bundle.rglob("*"))
    found = add_budgets(bundle, BudgetOptions((budget,), (photos,)), 1, quiet)
    assert found is not None
    after = read_config(bundle)
    assert json.loads(json.dumps(found)) == {**after["budgets"], "skipped": []}
    assert {key: value for key, value in after.items() if key != "budgets"} == before
    assert files == sorted(path.relative_to(bundle) for path in bundle.rglob("*"))
    assert after["budgets"]["calibration"] == {"images": 24, "labelled": True}
    runtime = adavit.load(bundle, threads=1, budget=budget)
    pixels = np.stack([runtime.preprocess(path) for path in sorted(photos.rglob("*.png"))])
    dense = runtime.bundle.config["macs"]["dense"]
    assert runtime.run(pixels).macs.mean() / dense == pytest.approx(budget, rel=calibration.FAR)
    again = add_budgets(bundle, BudgetOptions((budget,), (photos,)), 1, quiet)
    assert again == found  # the same images give the same points


def test_what_others_write_meanwhile_stays(bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, made = middle(bundle, photos), calibration.calibrate
    config = read_config(bundle)

    def meanwhile(*given: Any) -> Budgets:
        write_config(bundle, config)
        return made(*given)

    monkeypatch.setattr(calibration, "calibrate", meanwhile)
    config["engine_sets"] = {}
    add_budgets(bundle, BudgetOptions((budget,), (photos,)), 1, quiet)
    assert read_config(bundle).keys() >= {"engine_sets", "budgets"}
    config["engines"]["head"]["sha256"] = "0" * 64
    with pytest.raises(BundleError, match="was exported anew meanwhile; calibrate it again"):
        add_budgets(bundle, BudgetOptions((budget,), (photos,)), 1, quiet)
    assert read_config(bundle) == config


def test_unlabelled_and_unreadable_images(bundle: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for position, path in enumerate(sorted(photos.rglob("*.png"))):
        shutil.copy(path, folder / f"{position}.png")
    (folder / "empty.png").touch()
    found = add_budgets(bundle, BudgetOptions((middle(bundle, photos),), (folder,)), 1, quiet)
    assert found is not None
    assert found["calibration"] == {"images": 24, "labelled": False}
    assert [message.split(": ")[0] for message in found["skipped"]] == [str(folder / "empty.png")]
    assert all("accuracy" not in point["measured"] for point in found["points"])


def test_no_budgets_change_nothing(bundle: Path) -> None:
    before = (bundle / "config.json").read_bytes()
    assert add_budgets(bundle, BudgetOptions(), 1, quiet) is None
    assert (bundle / "config.json").read_bytes() == before


def test_what_fails_leaves_the_bundle_as_it_was(bundle: Path, photos: Path, tmp_path: Path) -> None:
    write_config(bundle, read_config(bundle))
    before = (bundle / "config.json").read_bytes()
    few = tmp_path / "few"
    few.mkdir()
    picture().save(few / "a.png")
    (few / "b.png").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "fifteen").mkdir()
    for options, message in (
        (BudgetOptions((0.3,), (tmp_path / "nowhere",)), "no such image or folder"),
        (BudgetOptions((0.3,), (tmp_path / "none",)), "holds no image file"),
        (BudgetOptions((0.3,), (few,)), "budgets need at least 16 images, 1 can be read; first unreadable"),
        (BudgetOptions((0.3,), (pictures_in(tmp_path / "fifteen", 15),)), "at least 16 images, 15 can be read"),
        (BudgetOptions((0.3,)), "--budgets needs --calibration-images"),
        (BudgetOptions((40.0,), (photos,)), "40 is no share of the dense MACs"),
        (BudgetOptions((0.0,), (photos,)), "0 is no share of the dense MACs"),
        (BudgetOptions((float("nan"),), (photos,)), "nan is no share of the dense MACs"),
        (BudgetOptions((0.3, 0.3), (photos,)), "a budget is given twice"),
        (BudgetOptions((0.001,), (photos,)), "a budget of 0.001 is out of reach"),
    ):
        with pytest.raises(InputError) as caught:
            add_budgets(bundle, options, 1, quiet)
        assert message in str(caught.value)
        assert (bundle / "config.json").read_bytes() == before
    assert sorted(path.name for path in bundle.iterdir() if path.name.startswith(".")) == []


def test_many_images_are_drawn_from_all_of_them(
    runtime: Runtime, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_IMAGES", 18)
    drawn, _ = Trial.of_files(runtime, (photos,), quiet)
    again, _ = Trial.of_files(runtime, (photos,), quiet)
    assert len(drawn) == 18
    assert drawn.labels is not None
    assert again.labels is not None
    assert set(drawn.labels) == {1, 3, 4}
    np.testing.assert_array_equal(drawn.labels, again.labels)


def test_no_more_images_are_held_than_memory_is_for(
    runtime: Runtime, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = 4 * 3 * tiny().image_size ** 2
    for memory, held in ((20 * image, 20), (5 * image, 16), (99 * image, 24)):  # as few as budgets need, in any case
        monkeypatch.setattr(module, "MOST_BYTES", memory)
        assert len(Trial.of_files(runtime, (photos,), quiet)[0]) == held


def test_labels_count_where_every_image_has_one(runtime: Runtime, photos: Path, tmp_path: Path) -> None:
    picture(99).save(tmp_path / "unlabelled.png")
    both, _ = Trial.of_files(runtime, (photos, tmp_path / "unlabelled.png"), quiet)
    assert (len(both), both.labels) == (25, None)
