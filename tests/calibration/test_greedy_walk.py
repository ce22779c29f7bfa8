"""Steps, walks, and where lines of offsets take so many MACs, on known landscapes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import tiny
from landscapes import ALIKE, SCALES, Landscape, Part, Recorded

from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.calibration.greedy_walk import GreedyWalk, moves_by_unit
from adavit.calibration.line_search import CLOSE, even_line, point_at_macs
from adavit.calibration.offset_evaluator import Outcome
from adavit.calibration.search_progress import SearchProgress


def test_doubt_is_the_standard_error_of_the_difference() -> None:
    scores = np.random.default_rng(0).random((2, 50))
    first, second = (Outcome(macs, s.mean(), 1, None, {}, s) for macs, s in zip((0.5, 0.4), scores, strict=True))
    error = np.std(scores[1] - scores[0]) / 50**0.5
    assert first.standard_error(second) == second.standard_error(first) == pytest.approx(error)
    assert first.standard_error(first) == first.standard_error(replace(second, scores=None)) == 0
    land: Any = Landscape(ALIKE, ALIKE)
    land.run = lambda offsets, count=None, like=None: first
    walk = GreedyWalk(land, TRAINED, -1, 0.02, moves_by_unit(tiny()))
    assert walk.gain_per_macs(second) == pytest.approx((scores[1].mean() - scores[0].mean() - error) / 0.1)


@pytest.mark.parametrize(("part", "power"), [(0.7, 1.0), (0.97, 1.0), (1.03, 1.0), (1.3, 1.0), (1.0, 1.05)])
@pytest.mark.parametrize("level", [0.2, 0.35, 0.5, 0.75, 0.95])
def test_the_trained_policy_is_moved_to_any_budget_although_few_images_differ_from_all(
    part: float, power: float, level: float
) -> None:
    land: Any = Part(part, power)
    assert point_at_macs(land, even_line(land, TRAINED), level).outcome.macs == pytest.approx(level, rel=CLOSE)


class NoTokens(Landscape):
    """Logits seem to decide on tokens, but nothing comes of it."""

    def run(self, offsets: Offsets, count: int | None = None, like: Any = None) -> Outcome:
        return super().run(replace(offsets, tokens=0.0), count, like)

    def record(self, offsets: Offsets, count: int) -> Recorded:
        return Recorded(Landscape(self.scales, self.importance), offsets, count)


def test_a_step_that_goes_no_further_is_not_taken() -> None:
    land: Any = NoTokens(ALIKE, ALIKE)
    walk = GreedyWalk(land, TRAINED, -1, 0.015, moves_by_unit(tiny()))
    while walk.last.outcome.macs > 0.45 and walk.step():
        pass
    assert walk.last.outcome.macs == pytest.approx(0.45, abs=0.03)
    assert max(np.diff([point.outcome.macs for point in walk.points])) < 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_steps_are_about_a_step_and_ends_are_reached(sign: int) -> None:
    land: Any = Landscape(SCALES[1], ALIKE)
    walk, end = GreedyWalk(land, TRAINED, sign, 0.02, moves_by_unit(tiny())), 0.12 if sign < 0 else 0.98
    while sign * (end - walk.last.outcome.macs) > 0 and walk.step():
        pass
    steps = sign * np.diff([point.outcome.macs for point in walk.points])
    assert min(steps) > 0
    assert max(steps) <= 0.04
    assert sign * (walk.last.outcome.macs - end) >= 0
    assert len(land.ran) < 150


def test_the_share_of_work_never_falls_whatever_the_parts_take() -> None:
    shares: list[float] = []
    progress = SearchProgress(shares.append)
    progress.ran(5)
    assert not shares  # nothing is planned yet
    progress.plan(10, 20, 30)
    for took in (2, 40, 15):
        progress.begin()
        for _ in range(took):
            progress.ran(1)
    assert shares == sorted(shares)
    assert shares[1] == pytest.approx(7 / 62, rel=0.2)
    assert 0.7 < shares[-1] < 1
    progress.end()
    assert shares[-1] == 1
