"""The search for operating points, on landscapes that are known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from landscapes import ALIKE, ASKED, KINDS, SCALES, Landscape, Part

from adavit.bundle.operating_points import TRAINED, Budgets, Offsets, OperatingPoint
from adavit.calibration import budgets as calibration
from adavit.calibration import search
from adavit.calibration.budgets import calibrate
from adavit.calibration.greedy_walk import GreedyWalk, moves_by_unit
from adavit.calibration.line_search import CLOSE, even_line, point_at_macs
from adavit.calibration.offset_evaluator import Outcome
from adavit.calibration.search_progress import SearchProgress
from adavit.errors import InputError


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
    assert len(land.ran) < 500


def test_kinds_that_need_each_other_move_together() -> None:
    land = Landscape(ALIKE, ALIKE, balance=20.0)
    for point in points_of(land, ASKED).values():
        kept = land.kept(point.offsets).values()
        assert max(kept) - min(kept) < 0.01


class Trap(Landscape):
    """Letting one kind go ahead pays at first, and costs much at small budgets, when offsets cannot turn back."""

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        found = super().run(offsets, count, like)
        apart = max(found.usage.values()) - min(found.usage.values())
        score = found.macs + (0.1 * apart if found.macs > 0.4 else -apart)
        return Outcome(found.macs, score, score, None, found.usage)


def test_what_pays_at_first_does_not_spoil_the_end() -> None:
    trap: Any = Trap(ALIKE, ALIKE)
    walk = GreedyWalk(trap, TRAINED, -1, 0.04, moves_by_unit(tiny()))
    while walk.last.outcome.macs > 0.25 and walk.step():
        pass
    assert walk.last.outcome.score < 0.1
    assert points_of(trap, [0.25, 0.5])[0.25].measured["agreement"] > 0.24


@given(st.tuples(*[st.floats(0.3, 3)] * 3), st.tuples(*[st.floats(0.1, 10)] * 3), st.floats(0, 10))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_points_are_no_worse_than_the_same_offset_for_all(scales: Any, importance: Any, balance: float) -> None:
    land = Landscape(dict(zip(KINDS, scales, strict=True)), dict(zip(KINDS, importance, strict=True)), balance)
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
        return replace(super().run(offsets, count, like), score=scores.mean(), scores=scores)


def is_even(offsets: Offsets) -> bool:
    """Whether all that a tiny model decides is shifted alike."""
    tokens, heads, sublayers = offsets.by_block(tiny().depth)
    return len({*tokens, *heads[1:], *sublayers[1:]}) == 1


@pytest.mark.parametrize(("lead", "taken"), [(0.02, True), (0.008, False), (-0.008, False)])
def test_what_may_be_luck_is_not_taken(lead: float, taken: bool) -> None:
    land: Any = Unsure(lead, noise=0.1)  # of 100 images: a standard error of 0.01
    walk = GreedyWalk(land, TRAINED, -1, 0.03, moves_by_unit(tiny()))
    assert walk.step()
    assert is_even(walk.last.offsets) == (not taken)
    points = points_of(land, [0.3, 0.8])
    assert {is_even(points[budget].offsets) for budget in (0.3, 0.8)} == {not taken}


@pytest.mark.parametrize(("part", "budget"), [(0.99, 0.25), (1.01, 0.9), (0.7, 0.28)])
def test_budgets_are_met_although_walks_run_few_images(part: float, budget: float) -> None:
    point = points_of(Part(part), [budget])[budget]
    assert point.measured["macs"] == pytest.approx(budget, rel=calibration.FAR)


class Gap(Landscape):
    """MACs between two values are never taken."""

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        found = super().run(offsets, count, like)
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
    land.progress = SearchProgress(lambda _: None)
    levels = [0.3, 0.5, 0.7]
    land.progress.plan(*search.expected(land, len(levels)))
    keeps, drops = Offsets(-2.0, 2.0, -2.0), Offsets(1.0, -2.0, 1.0)  # the heads, which are dear
    places = {
        level: point_at_macs(land, even_line(land, keeps if level == levels[good] else drops), level)
        for level in levels
    }
    monkeypatch.setattr(search, "point_on_walk", lambda evaluator, walk, level: places[level])
    for level, point in search.best_points(land, levels, land.progress).items():
        wanted = point_at_macs(land, even_line(land, keeps), level).outcome
        assert point.outcome.macs == pytest.approx(level, rel=CLOSE)
        assert point.outcome.score > wanted.score - 0.01


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
    monkeypatch.setattr(calibration, "point_between", lambda *_: OperatingPoint(0.56, zeros, {}))
    found = calibrate(land, [0.3, 0.8])
    assert Budgets.from_dict(found.to_dict(), tiny().depth) == found
    assert found.trained.budget == pytest.approx(0.55)


@pytest.mark.parametrize("budget", [0.05, 0.0999])
def test_a_budget_out_of_reach(budget: float) -> None:
    land: Any = Landscape(ALIKE, ALIKE)
    with pytest.raises(InputError, match=r"out of reach: this model's policies can set the MACs from 0\.100 to 1\.000"):
        calibrate(land, [budget])
