"""Weights of sets of heads: gathered once, kept within a budget, and let go of when others take their place."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import WIDE

import adavit
from adavit.runtime import Runtime
from adavit.runtime.heads import HeadWeights
from adavit.runtime.profile import Profiler

SETS = [np.array(heads) for heads in combinations(range(WIDE.heads), 3)]
SIZE = 4 * WIDE.width * 3 * WIDE.head_width
"""Bytes of a matrix of three heads' channels."""


class Counted:
    """Weights, and how often the engines that gather them run."""

    def __init__(self, bundle: Path) -> None:
        plain = adavit.load(bundle, threads=1)
        self.profiler = Profiler(plain.bundle, plain.backend)
        self.timed = Runtime(plain.bundle, self.profiler, plain.options)

    def within(self, budget: int) -> HeadWeights:
        return HeadWeights(self.timed.bundle, self.profiler, self.timed.dispatcher.engines.weights, budget)

    def gathers(self, ask: Callable[[], Any]) -> list[str]:
        with self.profiler.recording() as calls:
            ask()
        return [call.name for call in calls if call.name.endswith("_weights")]


@pytest.fixture(scope="module")
def counted(wide: tuple[Path, Path]) -> Counted:
    return Counted(wide[0])


def test_a_set_that_comes_again_costs_no_copy(counted: Counted) -> None:
    weights = counted.within(100 * SIZE)
    fresh = weights.without_budget()
    for block in (1, 2):
        for kind in ("attention", "mlp"):
            for heads in (SETS[0], SETS[1]):
                name = f"blocks.{block}.{kind}_weights"
                assert counted.gathers(lambda: getattr(weights, kind)(block, heads)) == [name]  # noqa: B023
                assert counted.gathers(lambda: getattr(weights, kind)(block, heads)) == []  # noqa: B023
                for _ in range(2):
                    assert counted.gathers(lambda: getattr(fresh, kind)(block, heads)) == [name]  # noqa: B023


def test_what_is_kept_is_of_its_block_and_heads(wide: tuple[Path, Path]) -> None:
    loaded = adavit.load(wide[0], threads=1)
    weights = HeadWeights(loaded.bundle, loaded.backend, loaded.dispatcher.engines.weights, 100 * SIZE)
    for _ in range(2):
        for block in (1, 2):
            for heads in (SETS[0], SETS[1]):
                fresh = weights.without_budget()
                for kept, new in zip(weights.attention(block, heads), fresh.attention(block, heads), strict=True):
                    np.testing.assert_array_equal(kept.numpy(), new.numpy())


@pytest.mark.parametrize("room", [1, 2, 5])
def test_no_more_is_kept_than_the_budget_is_for(room: int, counted: Counted) -> None:
    size = WIDE.hidden * SIZE // WIDE.width
    weights = counted.within(room * size + size // 2)
    for heads in SETS[:12]:
        assert counted.gathers(lambda: weights.mlp(1, heads))  # noqa: B023
    assert not counted.gathers(lambda: weights.mlp(1, SETS[11]))
    probe = [len(counted.gathers(lambda: weights.mlp(1, heads))) for heads in reversed(SETS[:12])]  # noqa: B023
    assert 12 - room <= sum(probe) < 12


def test_what_is_put_out_is_held_nowhere_else(counted: Counted) -> None:
    kept = [np.append(np.isin(np.arange(WIDE.heads), heads), [False, True]).tobytes() for heads in SETS[:2]]
    weights = counted.within(WIDE.hidden * SIZE // WIDE.width)  # of one set
    for choices in (kept[0], kept[1], kept[0]):
        assert counted.gathers(lambda: weights.of(1, choices)) == ["blocks.1.mlp_weights"]  # noqa: B023
        assert counted.gathers(lambda: weights.of(1, choices)) == []  # noqa: B023
    assert weights.of(1, bytes(WIDE.heads + 2)) is None  # no head
    assert counted.gathers(lambda: weights.of(0, kept[0])) == []  # a block that keeps every head has no such engine
