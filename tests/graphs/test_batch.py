"""Graphs of batches compute what the masked model computes, whatever the images keep and however much room there is."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from batch_reference import BatchReference, Outcome, all_of, fitting, limits_of, sizes_of
from cases import (
    DROP_ALL,
    GOLDEN_FILES,
    KEEP_ALL,
    WIDE,
    assert_same_policy,
    export,
    forced,
    golden,
    oracle,
    random_images,
    random_model,
    random_policy,
    tiny,
    with_weights,
)
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from strategies import BIASES, architectures

from adavit.architecture import Architecture
from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs
from adavit.graphs.batch import GOES_ON, NOT_FINITE, OVERFLOWED
from adavit.model import AdaViT
from adavit.runtime import Policy

SAFE = 1e-4
"""An image whose decisions come closer to a threshold than this may decide either way."""
T2T = tiny(stem="t2t", patch_size=16, image_size=48, width=96, heads=6, keep=0, qkv_bias=False)
ATTENTION_ROWS, ATTENTION_IMAGES, ATTENTION_TOKENS, MLP_ROWS = range(4)


@contextmanager
def graphs_of(model: AdaViT) -> Iterator[Graphs]:
    """The graphs of a model's bundle."""
    with tempfile.TemporaryDirectory() as folder:
        yield Graphs(Bundle.open(export(model, Path(folder), verify=False, with_dense=False)))


@pytest.fixture(scope="module")
def wide_model() -> AdaViT:
    """A model whose images run most sub-layers."""
    return random_model(WIDE, sublayers=1.0)


@pytest.fixture(scope="module")
def wide_graphs(wide_model: AdaViT) -> Iterator[Graphs]:
    with graphs_of(wide_model) as graphs:
        yield graphs


@pytest.fixture(scope="module")
def batches(wide_graphs: Graphs) -> BatchReference:
    """Runs batches of this model."""
    return BatchReference(wide_graphs, {})


def assert_same(found: Outcome, wanted: Outcome, images: object = slice(None)) -> None:
    """The same policy, and logits but for the order in which kernels for other sizes sum."""
    assert_same_policy(found.policy[images], wanted.policy[images])
    np.testing.assert_allclose(found.logits[images], wanted.logits[images], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden_vectors(name: str, golden_bundles: Callable[[str], Path]) -> None:
    images, logits, policy = golden(name)
    graphs = Graphs(Bundle.open(golden_bundles(name)))
    reference = BatchReference(graphs, {})
    found = reference.run(images)
    assert_same_policy(found.policy, policy)
    np.testing.assert_allclose(found.logits, logits, atol=1e-4, rtol=0)
    assert not found.states.any()
    assert_same(reference.run(images, all_of(graphs.architecture, len(images))), found)
    assert_same(reference.run(images, replay=policy), found)
    for image in range(len(images)):
        alone = reference.run(images[image : image + 1])
        assert_same_policy(alone.policy, policy[image : image + 1])
        np.testing.assert_allclose(alone.logits[0], found.logits[image], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_parts_compute_what_the_whole_does(name: str, golden_bundles: Callable[[str], Path]) -> None:
    images, _, policy = golden(name)
    graphs = Graphs(Bundle.open(golden_bundles(name)))
    whole, parts = BatchReference(graphs, {}), BatchReference(graphs, {}, in_parts=True)
    for image in (*range(len(images)), slice(None)):
        some = slice(image, image + 1) if isinstance(image, int) else image
        wanted, found = whole.run(images[some]), parts.run(images[some])
        assert_same(found, wanted)
        np.testing.assert_array_equal(found.states, wanted.states)
        ran = policy.sublayers[some].any(0)
        names = ["attention", "mlp", "decisions"]
        assert parts.ran == [
            "stem",
            *(
                f"blocks.{block}.{part}"
                for block in range(graphs.architecture.depth)
                for part, runs in zip(names, [*ran[block], True], strict=True)
                if runs
            ),
        ]


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(architectures(), st.integers(0, 1000), BIASES)
@example(tiny(), 0, {"heads": DROP_ALL})
@example(tiny(), 1, {"sublayers": DROP_ALL})
@example(tiny(keep=0), 3, {"tokens": DROP_ALL, "heads": DROP_ALL, "sublayers": DROP_ALL})
@example(T2T, 4, {})
@example(WIDE, 6, {"tokens": KEEP_ALL, "sublayers": KEEP_ALL})
@example(tiny(depth=1, keep=0), 10, {})
@example(tiny(head_policy=False, sublayer_policy=False, image_size=8), 11, {})
@example(tiny(token_policy=False), 12, {})
def test_batches_of_random_models(arch: Architecture, seed: int, biases: dict[str, float]) -> None:
    assume(arch.adapts)
    model, images = random_model(arch, seed, **biases), random_images(arch, 3, seed)
    with graphs_of(model) as graphs:
        reference, parts = BatchReference(graphs, {}), BatchReference(graphs, {}, in_parts=True)
        found = reference.run(images)
        logits, policy, margin = oracle(model, images)
        safe = np.flatnonzero(margin > SAFE)
        assert_same_policy(found.policy[safe], policy[safe])
        np.testing.assert_allclose(found.logits[safe], logits[safe], atol=1e-4, rtol=0)
        assert_asks_for_what_it_keeps(found)
        follow = random_policy(arch, len(images), seed)
        wanted = forced(model, images, follow)
        for run in (reference, parts):
            for rooms in (fitting, all_of(arch, len(images))):
                replayed = run.run(images, rooms, replay=follow)
                np.testing.assert_allclose(replayed.logits, wanted, atol=1e-4, rtol=0)
                assert not replayed.states.any()


def assert_asks_for_what_it_keeps(found: Outcome) -> None:
    wanted = [sizes_of(found.policy, block, state == GOES_ON) for block, state in enumerate(found.states[:-1])]
    np.testing.assert_array_equal(found.sizes, wanted)


class Overflow:
    """What becomes of images in the rooms of blocks, counted one by one.

    Args:
        policy: what the images keep.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.states = policy, [[GOES_ON] * len(policy)]

    def block(self, block: int, rooms: list[int]) -> None:
        """Adds the states behind a block."""
        tokens, states = self.policy.tokens[:, block].sum(1), list(self.states[-1])
        attention, mlp = (self.policy.sublayers[:, block] & (np.array(states) == GOES_ON)[:, None]).T
        rows = images = 0
        for image in attention.nonzero()[0]:
            rows, images = rows + tokens[image], images + 1
            if rows > rooms[0] or images > rooms[1] or tokens[image] > rooms[2]:
                states[image] = OVERFLOWED
        rows = 0
        for image in mlp.nonzero()[0]:
            if states[image] == GOES_ON:
                rows += tokens[image]
                if rows > rooms[3]:
                    states[image] = OVERFLOWED
        self.states.append(states)


@pytest.mark.parametrize("kind", [ATTENTION_ROWS, ATTENTION_IMAGES, ATTENTION_TOKENS, MLP_ROWS])
@pytest.mark.parametrize("seed", range(6))
def test_images_without_room_overflow_and_no_others(kind: int, seed: int, batches: BatchReference) -> None:
    images = random_images(WIDE, 6, seed)
    whole, source = batches.run(images), np.random.default_rng(seed)
    expected = Overflow(whole.policy)

    def rooms(block: int, sizes: np.ndarray) -> list[int]:
        room = fitting(block, sizes)
        if block == seed % 2 or source.random() < 0.3:
            room[kind] = int(source.integers(1, max(room[kind], 2)))
        expected.block(block, room)
        return room

    found = batches.run(images, rooms)
    np.testing.assert_array_equal(found.states, expected.states)
    assert (found.states[-1] == OVERFLOWED).any()
    assert_same(found, whole, np.flatnonzero(found.states[-1] == GOES_ON))
    assert_asks_for_what_it_keeps(found)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 7), share=st.sampled_from([0.3, 0.7, 0.95]))
def test_replayed_policies_without_room(seed: int, batch: int, share: float, batches: BatchReference) -> None:
    images, policy = random_images(WIDE, batch, seed), random_policy(WIDE, batch, seed)
    whole, source = batches.run(images, replay=policy), np.random.default_rng(seed)
    expected = Overflow(policy)

    def rooms(block: int, sizes: np.ndarray) -> list[int]:
        room = [max(1, round(size * source.uniform(share, 1.3))) for size in fitting(block, sizes)]
        expected.block(block, room)
        return room

    found = batches.run(images, rooms, replay=policy)
    np.testing.assert_array_equal(found.states, expected.states)
    assert_same(found, whole, np.flatnonzero(found.states[-1] == GOES_ON))


@pytest.mark.parametrize("arch", [tiny(), tiny(token_policy=False), tiny(sublayer_policy=False, head_policy=False)])
def test_images_that_are_no_numbers(arch: Architecture) -> None:
    images = random_images(arch, 4)
    with graphs_of(random_model(arch, sublayers=2.0)) as graphs:
        reference = BatchReference(graphs, {})
        wanted = reference.run(images)
        images[1, 0, 3, 3] = np.nan  # one pixel: one token's decision, where it decides
        found = reference.run(images)
    decides = 0 if arch.token_policy else 1
    assert found.states[decides:, 1].tolist() == [NOT_FINITE] * (arch.depth + 1 - decides)
    others = np.array([0, 2, 3])
    assert not found.states[:, others].any()
    assert_same(found, wanted, others)
    assert_asks_for_what_it_keeps(found)


@pytest.mark.parametrize("value", [2e30, -np.inf, np.nan])
@pytest.mark.parametrize("weight", ["blocks.1.head_select.mlp_head.bias", "blocks.1.attn.token_select.mlp_head.bias"])
def test_decisions_that_are_no_numbers(weight: str, value: float, bundle: Path) -> None:
    with_weights(bundle, weight, value)
    found = BatchReference(Graphs(Bundle.open(bundle)), {}).run(random_images(tiny(), 2))
    assert found.states.tolist() == [[GOES_ON] * 2, *[[NOT_FINITE] * 2] * 3]
    assert not found.sizes[1:].any()


def test_padding_reads_nothing_of_other_images() -> None:
    """Scores of images that differ by far more than what masks padding keys."""
    model, images = random_model(tiny(), sublayers=2.0), random_images(tiny(), 4)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.query.weight *= 300
            block.attn.key.weight *= 300
    logits, policy, _ = oracle(model, images)
    with graphs_of(model) as graphs:
        found = BatchReference(graphs, {}).run(images)
    assert_same_policy(found.policy, policy)
    np.testing.assert_allclose(found.logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("heads", [{1: (0, 2, 3, 5)}, {1: (4,), 2: (0, 1, 2, 3, 5)}])
def test_heads_left_out(heads: dict[int, tuple[int, ...]], in_parts: bool, wide_graphs: Graphs) -> None:
    images, policy = random_images(WIDE, 8), random_policy(WIDE, 8, 3)
    policy.heads[2:4, :, :] = False
    policy.heads[2:4, :, 4] = True
    policy.heads[:, 0] = True
    policy.sublayers[5, 1:] = False
    whole = BatchReference(wide_graphs, {}).run(images, replay=policy)
    found = BatchReference(wide_graphs, heads, in_parts).run(images, replay=policy)
    lacks = np.zeros(8, bool)
    for block, there in heads.items():
        wanted = policy.heads[:, block].copy()
        wanted[:, there] = False
        lacks |= wanted.any(1) & policy.sublayers[:, block].any(1)
    assert lacks.any() and not lacks.all()
    np.testing.assert_array_equal(found.states[-1], np.where(lacks, OVERFLOWED, GOES_ON))
    assert_same(found, whole, np.flatnonzero(~lacks))


def test_each_image_has_its_own_limits(batches: BatchReference) -> None:
    biases = [{"tokens": 0.4}, {"heads": -0.5}, {"sublayers": -0.7, "tokens": -0.2}, {}]
    images, limits = random_images(WIDE, len(biases), 7), limits_of(WIDE, len(biases))
    for image, bias in enumerate(biases):
        limits[:, image] -= np.array([bias.get(kind, 0.0) for kind in ("tokens", "heads", "sublayers")], np.float32)
    found = batches.run(images, limits=limits)
    for image, bias in enumerate(biases):
        biased = random_model(WIDE, **{**bias, "sublayers": 1.0 + bias.get("sublayers", 0.0)})
        logits, policy, margin = oracle(biased, images[image : image + 1])
        assert margin[0] > SAFE
        assert_same_policy(found.policy[image : image + 1], policy)
        np.testing.assert_allclose(found.logits[image], logits[0], atol=1e-4, rtol=0)
