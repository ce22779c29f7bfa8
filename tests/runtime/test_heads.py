"""Weights of sets of heads: taken once, kept within a budget, and let go of when others take their place."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import WIDE, random_model

import adavit
from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Arrays
from adavit.bundle.keys import BOTH, BlockKey, Sublayers
from adavit.runtime.head_cache import HeadCache

MLP = Sublayers(False, True)
KEYS = [BlockKey(1, MLP, heads) for heads in combinations(range(WIDE.heads), 3)]
SIZE = 4 * WIDE.hidden * 3 * WIDE.head_width + 8 * 3
"""Bytes that three heads' channels take: of fc1, and their numbers. All of fc2 is the file's own memory."""


class Counted:
    """A cache, and what it was made of."""

    def __init__(self, graphs: Graphs, budget: int) -> None:
        self.made: list[Arrays] = []
        self.cache: HeadCache[Any] = HeadCache(graphs, self.make, budget)

    def make(self, arrays: Arrays) -> Arrays:
        self.made.append(arrays)
        return arrays

    def takes(self, key: BlockKey) -> bool:
        """Whether a key's weights have to be taken."""
        before = len(self.made)
        self.cache.release(self.cache.acquire(key))
        return len(self.made) > before


@pytest.fixture(scope="module")
def graphs(wide: tuple[Path, Path]) -> Graphs:
    return adavit.load(wide[0], threads=1, specialise=False).graphs


def test_a_set_that_comes_a_third_time_costs_no_copy(graphs: Graphs) -> None:
    counted, never = Counted(graphs, 1 << 30), Counted(graphs, 0)
    for block in (1, 2):
        for sublayers in (BOTH, MLP, Sublayers(True, False)):
            for heads in ((0, 1), (1, 3, 4)):
                key = BlockKey(block, sublayers, heads)
                assert [counted.takes(key) for _ in range(4)] == [True, True, False, False]
                assert [never.takes(key) for _ in range(3)] == [True, True, True]


@pytest.mark.parametrize("room", [1, 2, 5])
def test_no_more_is_kept_than_the_budget_is_for(room: int, graphs: Graphs) -> None:
    counted = Counted(graphs, room * SIZE + SIZE // 2)
    for key in [*KEYS[:10], *KEYS[:10]]:
        assert counted.takes(key)
    assert [counted.takes(key) for key in KEYS[:10]].count(False) == room


def test_what_comes_more_often_takes_the_place_of_what_comes_less(graphs: Graphs) -> None:
    counted = Counted(graphs, SIZE)
    for _ in range(2):
        assert counted.takes(KEYS[0])
    assert not counted.takes(KEYS[0])
    assert [counted.takes(KEYS[1]) for _ in range(3)] == [True, True, True]  # as often as the other
    assert not counted.takes(KEYS[0])
    for _ in range(5):
        counted.takes(KEYS[1])
    assert not counted.takes(KEYS[1])
    assert counted.takes(KEYS[0])


def test_what_is_larger_than_the_budget_is_not_kept_and_puts_nothing_out(graphs: Graphs) -> None:
    counted, large = Counted(graphs, 2 * SIZE), BlockKey(1, BOTH, (0, 1, 2, 3, 4))
    assert [counted.takes(KEYS[0]) for _ in range(3)] == [True, True, False]
    assert [counted.takes(large) for _ in range(4)] == [True] * 4
    assert not counted.takes(KEYS[0])


def test_rare_sets_are_cut_into_memory_that_is_used_again(graphs: Graphs) -> None:
    counted = Counted(graphs, 1 << 30)
    for key in KEYS[:2]:
        counted.takes(key)
    first, second = counted.cache.acquire(KEYS[2]), counted.cache.acquire(KEYS[3])
    assert not np.shares_memory(first.arrays["fc1"], second.arrays["fc1"])  # two threads have one each
    np.testing.assert_array_equal(first.arrays["fc1"], graphs.head_weights(KEYS[2])["fc1"])
    before = np.asarray(first.arrays["fc1"])
    counted.cache.release(first)
    third = counted.cache.acquire(KEYS[4])
    assert np.shares_memory(before, third.arrays["fc1"])
    np.testing.assert_array_equal(second.arrays["fc1"], graphs.head_weights(KEYS[3])["fc1"])


def test_all_heads_share_the_files_memory(graphs: Graphs) -> None:
    """So they are kept whatever the budget: they take none, but for the queries' scaled weights."""
    file = np.frombuffer(graphs.tensors.data, np.uint8)
    every = graphs.head_weights(BlockKey(1, MLP, tuple(range(WIDE.heads))))
    some = graphs.head_weights(KEYS[0])
    assert np.shares_memory(every["fc1"], file)
    assert np.shares_memory(every["fc2"], file)
    assert np.shares_memory(some["fc2"], file)
    assert not np.shares_memory(some["fc1"], file)
    assert not every["fc1"].flags.writeable


def test_weights_are_those_of_the_heads(graphs: Graphs) -> None:
    block, (d, heads) = random_model(WIDE).blocks[1], (WIDE.head_width, (1, 4))
    kept = np.concatenate([np.arange(head * d, (head + 1) * d) for head in heads])
    weights = graphs.head_weights(BlockKey(1, BOTH, heads))
    parts = np.split(weights["qkv"], 3)
    for part, name, scale in zip(parts, ("query", "key", "value"), (d**-0.5, 1, 1), strict=True):
        wanted = getattr(block.attn, name).weight.detach().numpy()[kept] * np.float32(scale)
        np.testing.assert_array_equal(part, wanted)
    query, key, value = np.split(weights["qkv_bias"], 3)
    np.testing.assert_allclose(query, block.attn.query.bias.detach().numpy()[kept] * d**-0.5, rtol=1e-6)
    assert not key.any()  # it adds the same to all scores of a query, which the softmax takes away
    np.testing.assert_array_equal(value, block.attn.value.bias.detach().numpy()[kept])
    np.testing.assert_array_equal(weights["proj"], block.attn.proj.weight.detach().numpy()[:, kept])
    np.testing.assert_array_equal(weights["fc1"], block.mlp.fc1.weight.detach().numpy()[:, kept])
    np.testing.assert_array_equal(weights["fc2"], block.mlp.fc2.weight.detach().numpy())
    np.testing.assert_array_equal(weights["heads"], heads)
    assert weights["heads"].dtype == np.int64


def test_many_threads_get_what_one_gets(graphs: Graphs) -> None:
    counted, together = Counted(graphs, 3 * SIZE), threading.Barrier(4)
    wanted = [graphs.head_weights(key)["fc1"] for key in KEYS]

    def work(seed: int) -> None:
        together.wait(60)
        for number in np.random.default_rng(seed).integers(0, len(KEYS), 100):
            lease = counted.cache.acquire(KEYS[number])
            np.testing.assert_array_equal(lease.values["heads"], KEYS[number].heads)
            np.testing.assert_array_equal(lease.values["fc1"], wanted[number])
            counted.cache.release(lease)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
