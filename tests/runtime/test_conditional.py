"""What a policy drops is not computed: watched through a backend that notes what every block runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import WIDE, random_images, random_policy

import adavit
from adavit.bundle.keys import BOTH, NONE, BlockKey, Sublayers
from adavit.runtime import Policy, Runtime

IMAGES = random_images(WIDE, 1)
EVERY = tuple(range(WIDE.heads))


class RecordingSlot:
    """A slot that notes what its image runs."""

    def __init__(self, slot: Any, ran: list[tuple[BlockKey, int]]) -> None:
        self.slot = slot
        self.ran = ran

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slot, name)

    def block(self, key: BlockKey, tokens: np.ndarray) -> None:
        assert tokens.dtype == np.int64
        assert tokens[0] == 0
        assert (np.diff(tokens) > 0).all()
        self.ran.append((key, len(tokens)))
        self.slot.block(key, tokens)


class Watching:
    """ONNX Runtime, watched; one more backend behind the Protocol."""

    name = "watching"

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.ran: list[tuple[BlockKey, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def slot(self, threads: int) -> RecordingSlot:
        return RecordingSlot(self.inner.slot(threads), self.ran)


@pytest.fixture(scope="module")
def watched(wide: tuple[Path, Path]) -> Runtime:
    plain = adavit.load(wide[0], threads=1, specialise=False)
    backend: Any = Watching(plain.backend)
    return Runtime(plain.bundle, plain.graphs, backend, plain.options, specialise=False)


def ran(runtime: Runtime, policy: Policy, images: np.ndarray = IMAGES) -> list[tuple[BlockKey, int]]:
    """What each block ran, and on how many tokens, in order."""
    backend: Any = runtime.backend
    backend.ran.clear()
    runtime.run(images, policy=policy)
    return list(backend.ran)


def test_everything_runs_when_everything_is_kept(watched: Runtime) -> None:
    found = ran(watched, Policy.dense(WIDE, 1))
    assert found == [(BlockKey(block, BOTH, EVERY), WIDE.tokens) for block in range(WIDE.depth)]


def test_dropped_tokens_are_not_computed(watched: Runtime) -> None:
    policy = Policy.dense(WIDE, 1)
    for block, kept in enumerate((30, 7, 1)):
        policy.tokens[0, block, kept:] = False
    assert [tokens for _, tokens in ran(watched, policy)] == [30, 7, 1]


@pytest.mark.parametrize("runs", [Sublayers(False, True), Sublayers(True, False), NONE], ids=lambda runs: runs.name)
def test_skipped_sublayers_do_not_run(runs: Sublayers, watched: Runtime) -> None:
    policy = Policy.dense(WIDE, 1)
    policy.sublayers[0, 1] = runs
    found = [key for key, _ in ran(watched, policy)]
    assert [key.sublayers for key in found] == [BOTH, runs, BOTH]
    assert found[1].heads == (EVERY if any(runs) else ())


def test_dropped_heads_have_no_weights(watched: Runtime) -> None:
    policy = Policy.dense(WIDE, 1)
    policy.heads[0, 1] = False
    policy.heads[0, 2, [0, 3]] = False
    assert [key.heads for key, _ in ran(watched, policy)] == [EVERY, (), (1, 2, 4, 5)]
    for key, heads in ((BlockKey(1, BOTH, ()), 0), (BlockKey(2, BOTH, (1, 2, 4, 5)), 4)):
        weights, channels = watched.graphs.head_weights(key), heads * WIDE.head_width
        assert weights["qkv"].shape == (3 * channels, WIDE.width)
        assert weights["proj"].shape == (WIDE.width, channels)
        assert weights["fc1"].shape == (WIDE.hidden, channels)


def test_each_image_of_a_batch_runs_what_it_keeps(watched: Runtime) -> None:
    policy = random_policy(WIDE, 5, seed=3)
    found = ran(watched, policy, np.repeat(IMAGES, 5, 0))
    for block in range(WIDE.depth):
        keys = [(key, tokens) for key, tokens in found if key.block == block]
        for image, (key, tokens) in enumerate(keys):
            assert tokens == policy.tokens[image, block].sum()
            assert list(key.sublayers) == policy.sublayers[image, block].tolist()
            kept = policy.heads[image, block].nonzero()[0] if any(key.sublayers) else ()
            assert key.heads == tuple(kept)


def order(runtime: Runtime, images: int) -> Iterator[int]:
    for key, _ in ran(runtime, Policy.dense(WIDE, images), np.repeat(IMAGES, images, 0)):
        yield key.block


def test_images_go_through_the_blocks_together(watched: Runtime) -> None:
    """A block's weights are still in the cache for the next image."""
    assert list(order(watched, 4)) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert list(order(watched, 1)) == [0, 1, 2]
