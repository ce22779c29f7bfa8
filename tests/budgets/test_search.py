"""The search for operating points, on landscapes that are known."""

from collections.abc import Collection
from dataclasses import replace
from math import exp
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from cases import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from adavit.calibration import budgets as calibration
from adavit.calibration import choose
from adavit.calibration.budgets import calibrate
from adavit.calibration.meet import CLOSE, Stop, even, meet
from adavit.calibration.trial import Outcome
from adavit.calibration.walk import Walk
from adavit.calibration.work import Work
from adavit.errors import InputError
from adavit.runtime.budget import TRAINED, Budgets, Offsets, OperatingPoint

KINDS = ("tokens", "heads", "sublayers")


def kept(logit: float) -> float:
    """The share that is kept, a logistic function."""
    return 1 / (1 + exp(-max(-99.0, logit)))


def spread(values: Collection[float]) -> float:
    """The standard deviation."""
    mean = fmean(values)
    return fmean((value - mean) ** 2 for value in values) ** 0.5


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
        self.work: Any = None
        self.tried = 0
        self.trained = self.run(TRAINED)

    def kept(self, offsets: Offsets) -> dict[str, float]:
        arch = self.runtime.architecture
        chosen = zip(KINDS, offsets.by_block(arch.depth), (0, arch.keep, arch.keep), strict=True)
        return {kind: fmean(kept(value / self.scales[kind]) for value in row[first:]) for kind, row, first in chosen}

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        self.tried += 1
        kept = self.kept(offsets)
        macs = 0.1 + 0.9 * (sum(kept.values()) / 3)
        score = 1 - sum(self.worth[kind] * (1 - kept[kind]) ** 2 for kind in KINDS)
        score -= self.balance * spread(kept.values())
        return Outcome(macs, score, score, None, kept)

    def record(self, offsets: Offsets, count: int) -> "Recorded":
        return Recorded(self, offsets, count)

    def __len__(self) -> int:
        return 1000


class Recorded:
    """Stands for recorded logits, whose predictions are right where they were recorded, and else a little off."""

    def __init__(self, land: Landscape, offsets: Offsets, count: int) -> None:
        self.arch, self.offsets = land.runtime.architecture, offsets
        self._land, self._count, self._here = land, count, land.run(offsets, count).macs

    def macs(self, offsets: Offsets, count: int | None = None) -> float:
        self._land.tried -= 1
        return float(self._here * (self._land.run(offsets, self._count).macs / self._here) ** 1.2)

    def reach(self, unit: Any) -> tuple[float, float]:
        kind, block = unit
        here = self.offsets.by_block(self.arch.depth)[KINDS.index(kind)][block]
        return min(0.0, -9 * self._land.scales[kind] - here), max(0.0, 9 * self._land.scales[kind] - here)

    def __len__(self) -> int:
        return self._count


ALIKE = dict.fromkeys(KINDS, 1.0)
SCALES = [ALIKE, {"tokens": 0.05, "heads": 1.0, "sublayers": 30.0}]
ASKED = [0.25, 0.4, 0.7, 0.9]


def points_of(land: Any, asked: list[float]) -> dict[float, OperatingPoint]:
    return {point.budget: point for point in calibrate(land, asked).points}


@pytest.mark.parametrize("scales", SCALES, ids=["alike", "different"])
@pytest.mark.parametrize("dear", KINDS)
def test_budgets_are_met_where_it_costs_least(dear: str, scales: dict[str, float]) -> None:
    land = Landscape(scales, {kind: 10.0 if kind == dear else 1.0 for kind in KINDS})
    points = points_of(land, ASKED)
    for budget in ASKED:
        point = points[budget]
        assert point.measured["macs"] == pytest.approx(budget, rel=CLOSE)
        kept = land.kept(point.offsets)
        assert kept[dear] > max(kept.values()) - 0.05
        # No worse than the same offset for all kinds, in units of their scales, at as many MACs.
        level = (budget - 0.1) / 0.9
        assert point.measured["agreement"] >= 1 - 12 * (1 - level) ** 2 - 0.02
    assert land.tried < 600


def test_kinds_that_need_each_other_move_together() -> None:
    land = Landscape(ALIKE, ALIKE, balance=20.0)
    for point in points_of(land, ASKED).values():
        kept = land.kept(point.offsets).values()
        assert max(kept) - min(kept) < 0.01


class Trap(Landscape):
    """Letting one kind go ahead pays at first, and costs much at small budgets, when offsets cannot turn back."""

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        found = super().run(offsets)
        apart = max(found.usage.values()) - min(found.usage.values())
        score = found.macs + (0.1 * apart if found.macs > 0.4 else -apart)
        return Outcome(found.macs, score, score, None, found.usage)


def test_what_pays_at_first_does_not_spoil_the_end() -> None:
    trap: Any = Trap(ALIKE, ALIKE)
    walk = Walk(trap, TRAINED, -1, 0.04)
    while walk.here.outcome.macs > 0.25 and walk.onward():
        pass
    assert walk.here.outcome.score < 0.1
    assert points_of(trap, [0.25, 0.5])[0.25].measured["agreement"] > 0.24


@given(st.tuples(*[st.floats(0.3, 3)] * 3), st.tuples(*[st.floats(0.1, 10)] * 3), st.floats(0, 10))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_points_are_no_worse_than_the_same_offset_for_all(scales: Any, worth: Any, balance: float) -> None:
    land = Landscape(dict(zip(KINDS, scales, strict=True)), dict(zip(KINDS, worth, strict=True)), balance)
    trained, points = land.trained.score, points_of(land, ASKED)
    for point in (points[budget] for budget in ASKED):
        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            alike = land.run(Offsets(middle, middle, middle))
            low, high = (middle, high) if alike.macs < point.measured["macs"] else (low, middle)
        tolerance = 0.02 + 0.1 * abs(trained - alike.agreement)  # scores are compared at nearly equal MACs
        assert point.measured["agreement"] >= alike.agreement - tolerance


class Unsure(Landscape):
    """Keeping more of one thing than of another seems to gain a little, more with some images than with others."""

    def __init__(self, lead: float, noise: float) -> None:
        self.gains = lead + np.where(np.arange(100) % 2, noise, -noise)
        super().__init__(ALIKE, dict.fromkeys(KINDS, 0.0))

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        scores = np.full(100, 0.5) + (0 if is_even(offsets) else self.gains)
        return replace(super().run(offsets), score=scores.mean(), scores=scores)


def is_even(offsets: Offsets) -> bool:
    """Whether all that a tiny model decides is shifted alike."""
    tokens, heads, sublayers = offsets.by_block(tiny().depth)
    return len({*tokens, *heads[1:], *sublayers[1:]}) == 1


@pytest.mark.parametrize(("lead", "taken"), [(0.02, True), (0.008, False), (-0.008, False)])
def test_what_may_be_luck_is_not_taken(lead: float, taken: bool) -> None:
    land: Any = Unsure(lead, noise=0.1)  # of 100 images: a standard error of 0.01
    walk = Walk(land, TRAINED, -1, 0.03)
    assert walk.onward()
    assert is_even(walk.here.offsets) == (not taken)
    points = points_of(land, [0.3, 0.8])
    assert {is_even(points[budget].offsets) for budget in (0.3, 0.8)} == {not taken}


def test_doubt_is_the_standard_error_of_the_difference() -> None:
    scores = np.random.default_rng(0).random((2, 50))
    first, second = (Outcome(macs, s.mean(), 1, None, {}, s) for macs, s in zip((0.5, 0.4), scores, strict=True))
    error = np.std(scores[1] - scores[0]) / 50**0.5
    assert first.doubt(second) == second.doubt(first) == pytest.approx(error)
    assert first.doubt(first) == first.doubt(replace(second, scores=None)) == 0
    land: Any = Landscape(ALIKE, ALIKE)
    walk = Walk(land, TRAINED, -1, 0.02)
    walk.stops = [Stop(TRAINED, first)]
    assert walk.value(Stop(TRAINED, second)) == pytest.approx((scores[1].mean() - scores[0].mean() - error) / 0.1)


class Part(Landscape):
    """Some of the images take other MACs than all of them, by a factor and a power."""

    def __init__(self, part: float, power: float = 1.0) -> None:
        self.part, self.power = part, power
        super().__init__(ALIKE, ALIKE)

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        found = super().run(offsets)
        return found if count in (None, len(self)) else replace(found, macs=found.macs**self.power * self.part)


@pytest.mark.parametrize(("part", "power"), [(0.7, 1.0), (0.97, 1.0), (1.03, 1.0), (1.3, 1.0), (1.0, 1.05)])
@pytest.mark.parametrize("level", [0.2, 0.35, 0.5, 0.75, 0.95])
def test_the_trained_policy_is_moved_to_any_budget_although_few_images_differ_from_all(
    part: float, power: float, level: float
) -> None:
    land: Any = Part(part, power)
    assert meet(land, even(land, TRAINED), level).outcome.macs == pytest.approx(level, rel=CLOSE)


@pytest.mark.parametrize(("part", "budget"), [(0.99, 0.25), (1.01, 0.9), (0.7, 0.28)])
def test_budgets_are_met_although_walks_run_few_images(part: float, budget: float) -> None:
    point = points_of(Part(part), [budget])[budget]
    assert point.measured["macs"] == pytest.approx(budget, rel=calibration.FAR)


class NoTokens(Landscape):
    """Logits seem to decide on tokens, but nothing comes of it."""

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        return super().run(replace(offsets, tokens=0.0))

    def record(self, offsets: Offsets, count: int) -> Recorded:
        return Recorded(Landscape(self.scales, self.worth), offsets, count)


def test_a_step_that_goes_no_further_is_not_taken() -> None:
    land: Any = NoTokens(ALIKE, ALIKE)
    walk = Walk(land, TRAINED, -1, 0.015)
    while walk.here.outcome.macs > 0.45 and walk.onward():
        pass
    assert walk.here.outcome.macs == pytest.approx(0.45, abs=0.03)
    assert max(np.diff([stop.outcome.macs for stop in walk.stops])) < 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_steps_are_about_a_step_and_ends_are_reached(sign: int) -> None:
    land: Any = Landscape(SCALES[1], ALIKE)
    walk, end = Walk(land, TRAINED, sign, 0.02), 0.12 if sign < 0 else 0.98
    while sign * (end - walk.here.outcome.macs) > 0 and walk.onward():
        pass
    steps = sign * np.diff([stop.outcome.macs for stop in walk.stops])
    assert min(steps) > 0
    assert max(steps) <= 0.04
    assert sign * (walk.here.outcome.macs - end) >= 0
    assert land.tried < 150


class Gap(Landscape):
    """MACs between two values are never taken."""

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        found = super().run(offsets)
        return replace(found, macs=found.macs if not 0.3 < found.macs < 0.5 else 0.3)


def test_a_budget_that_nothing_comes_near_to_is_an_error() -> None:
    gap = Gap(ALIKE, ALIKE)
    with pytest.raises(InputError, match=r"a budget of 0\.4 cannot be met: the nearest found is 0\.(3|5)"):
        points_of(gap, [0.28, 0.4])
    with pytest.raises(InputError, match=r"a budget of 0\.32 cannot be met: the nearest found is 0\.3"):
        points_of(gap, [0.28, 0.32])
    assert points_of(gap, [0.28, 0.52]).keys() >= {0.28, 0.52}


def test_the_trained_policy_is_a_point_and_points_ascend() -> None:
    land: Any = Landscape(ALIKE, ALIKE)
    found = calibrate(land, [0.8, 0.3])
    assert found.trained.budget == pytest.approx(0.55)
    assert found.trained.measured["macs"] == land.trained.macs
    asked = [point.budget for point in found.points]
    assert asked == sorted(set(asked))
    assert {0.3, 0.8} < set(asked)
    assert Budgets.from_dict(found.to_dict(), tiny().depth) == found
    for budget in np.linspace(0.3, 0.8, 21):
        assert land.run(found.offsets(budget)).macs == pytest.approx(budget, rel=0.02)


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_what_loses_nothing_is_given_up_for_what_gains(budget: float) -> None:
    land = Landscape(ALIKE, {"tokens": 0.0, "heads": 1.0, "sublayers": 1.0})
    point = points_of(land, [0.3, budget])[budget]
    kept, level = land.kept(point.offsets), (budget - 0.1) / 0.9
    assert kept["tokens"] < 0.5 < min(kept["heads"], kept["sublayers"])
    alike = 1 - 2 * (1 - level) ** 2  # the same offset for all, whose kinds keep as much each
    assert point.measured["agreement"] > alike + 0.5 * (1 - alike)


@pytest.mark.parametrize("good", [0, 1, 2])
def test_what_is_good_at_a_budget_is_tried_at_all_others(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    land: Any = Landscape(ALIKE, {"tokens": 1.0, "heads": 10.0, "sublayers": 1.0})
    land.work = Work(lambda _: None)
    levels = [0.3, 0.5, 0.7]
    land.work.plan(*choose.expected(land, len(levels)))
    keeps, drops = Offsets(-2.0, 2.0, -2.0), Offsets(1.0, -2.0, 1.0)  # the heads, which are dear
    places = {level: meet(land, even(land, keeps if level == levels[good] else drops), level) for level in levels}
    monkeypatch.setattr(choose, "_place", lambda trial, walk, level: places[level])
    for level, stop in choose.best_stops(land, levels, land.work).items():
        wanted = meet(land, even(land, keeps), level).outcome
        assert stop.outcome.macs == pytest.approx(level, rel=CLOSE)
        assert stop.outcome.score > wanted.score - 0.01


def test_a_budget_of_the_trained_policy_is_the_trained_policy() -> None:
    land: Any = Landscape(ALIKE, ALIKE)
    (point,) = calibrate(land, [0.551]).points
    assert (point.budget, point.offsets) == (0.551, TRAINED)
    with pytest.raises(InputError, match=r"budgets of 0.55 and 0.551 are all what the trained policy takes \(0.5500\)"):
        calibrate(land, [0.55, 0.3, 0.551])


@pytest.mark.parametrize("zeros", [TRAINED, Offsets(*[(0.0,) * tiny().depth] * 3)], ids=["trained", "as good as"])
def test_points_that_come_upon_the_trained_policy_leave_one_of_it(
    zeros: Offsets, monkeypatch: pytest.MonkeyPatch
) -> None:
    land: Any = Landscape(ALIKE, ALIKE)
    monkeypatch.setattr(calibration, "_astray", lambda *_: OperatingPoint(0.56, zeros, {}))
    found = calibrate(land, [0.3, 0.8])
    assert Budgets.from_dict(found.to_dict(), tiny().depth) == found
    assert found.trained.budget == pytest.approx(0.55)


@pytest.mark.parametrize("budget", [0.05, 0.0999])
def test_a_budget_out_of_reach(budget: float) -> None:
    land: Any = Landscape(ALIKE, ALIKE)
    with pytest.raises(InputError, match=r"out of reach: this model's policies can set the MACs from 0\.100 to 1\.000"):
        calibrate(land, [budget])


def test_the_share_of_work_never_falls_whatever_the_parts_take() -> None:
    shares: list[float] = []
    work = Work(shares.append)
    work.ran(5)
    assert not shares  # nothing is planned yet
    work.plan(10, 20, 30)
    for took in (2, 40, 15):
        work.begin()
        for _ in range(took):
            work.ran(1)
    assert shares == sorted(shares)
    assert shares[1] == pytest.approx(7 / 62, rel=0.2)
    assert 0.7 < shares[-1] < 1
    work.end()
    assert shares[-1] == 1
