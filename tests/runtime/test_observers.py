"""What an observer is shown: each image before each block, with what the masked model computes there."""

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import GOLDEN, GOLDEN_FILES, WIDE, assert_same_policy, golden, random_images, random_model, random_policy

import adavit
from adavit.architecture import TOKEN_LOGIT
from adavit.bundle.operating_points import Offsets
from adavit.model import AdaViT, load_checkpoint
from adavit.model.policy import BlockPolicy
from adavit.runtime import Policy, Runtime
from adavit.runtime.dispatcher import Step


class Seen:
    """An observer that keeps all it is shown, by image."""

    def __init__(self) -> None:
        self.steps: dict[int, list[Step]] = defaultdict(list)
        self.lock = threading.Lock()

    def __call__(self, step: Step) -> None:
        decisions = None if step.decisions is None else step.decisions.copy()
        with self.lock:
            self.steps[step.image].append(step._replace(tokens=step.tokens.copy(), decisions=decisions))


@torch.no_grad()
def masked(model: AdaViT, images: np.ndarray, policy: Policy) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Under a policy: what each block is given, and the last one makes [B, N, D], and its decision logits [B, n]."""
    x = model.embed(torch.from_numpy(images))
    masks = [torch.from_numpy(mask.astype(np.float32)) for mask in policy.masks()]
    found = []
    for index, block in enumerate(model.blocks):
        normed = block.norm1(x)
        logits = block.decision_logits(x, normed)
        there = [values.numpy() for values in (logits.tokens, logits.heads, logits.sublayers) if values is not None]
        found.append((x.numpy(), there))
        under = BlockPolicy(*(mask[:, index] for mask in masks))
        x = block.mlp_step(block.attention_step(x, normed, under), under)
    return [*found, (x.numpy(), [])]


def assert_shown(seen: Seen, runtime: Runtime, model: AdaViT, images: np.ndarray, policy: Policy) -> None:
    arch, wanted = runtime.architecture, masked(model, images, policy)
    assert sorted(seen.steps) == list(range(len(images)))
    for image, steps in seen.steps.items():
        assert [step.block for step in steps] == list(range(arch.depth + 1))
        for step, (tokens, decisions) in zip(steps, wanted, strict=True):
            scale = max(1.0, float(np.abs(tokens[image]).max()))
            np.testing.assert_allclose(step.tokens, tokens[image], atol=1e-4 * scale)
            if step.block == arch.depth:
                assert step.decisions is None
                assert step.kept is None
                continue
            first = 1 if arch.token_policy else 0  # the class token's means nothing
            found = step.decisions[first:]
            values = np.concatenate([kind[image] for kind in decisions]) if decisions else np.empty(0)
            np.testing.assert_allclose(found, values, atol=1e-4 * max(1.0, float(np.abs(values).max(initial=0))))


@pytest.mark.parametrize("parallel", ["operators", "samples", "auto"])
@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_steps_of_golden_bundles(name: str, parallel: str, golden_bundles: Callable[[str], Path]) -> None:
    runtime = adavit.load(golden_bundles(name), threads=2, parallel=parallel, specialise=False)
    model, (images, _, policy), seen = load_checkpoint(GOLDEN / GOLDEN_FILES[name]), golden(name), Seen()
    result = runtime.run(images, observe=seen)
    assert_same_policy(result.policy, policy)
    assert_shown(seen, runtime, model, images, policy)
    np.testing.assert_array_equal(runtime.run(images).logits, result.logits)


def test_what_is_kept_is_what_the_policy_has(wide: tuple[Path, Path]) -> None:
    runtime, images = adavit.load(wide[0], threads=1, specialise=False), random_images(WIDE, 4)
    for offsets in (Offsets(), Offsets(tokens=0.5, heads=(0.0, -0.4, 0.8), sublayers=-0.2)):
        seen = Seen()
        policy = runtime.run(images, observe=seen, budget=offsets).policy
        by_block = offsets.by_block(WIDE.depth)
        for image, steps in seen.steps.items():
            for step in steps[:-1]:
                block = step.block
                parts = [policy.tokens[image, block]]
                limits = [[-np.inf], np.full(WIDE.tokens - 1, TOKEN_LOGIT - by_block[0][block])]
                if WIDE.adapts_heads(block):
                    parts += [policy.heads[image, block], policy.sublayers[image, block]]
                    limits += [np.full(WIDE.heads, -by_block[1][block]), np.full(2, -by_block[2][block])]
                np.testing.assert_array_equal(step.kept, np.concatenate(parts))
                np.testing.assert_array_equal(step.kept, step.decisions > np.concatenate(limits).astype(np.float32))


@pytest.mark.parametrize("prepared", [False, True])
def test_a_replay_shows_what_would_be_decided(prepared: bool, wide: tuple[Path, Path]) -> None:
    runtime, images = adavit.load(wide[0], threads=1, specialise=False), random_images(WIDE, 3)
    policy, seen = random_policy(WIDE, 3, seed=5), Seen()
    kept = Policy(*(mask.copy() for mask in policy.masks()))
    if prepared:
        assert runtime.specialise(policy) > 0
    result = runtime.run(images, policy=policy, observe=seen)
    assert_same_policy(result.policy, kept)
    assert_shown(seen, runtime, random_model(WIDE), images, policy)
    assert any(
        (step.kept[: WIDE.tokens] != kept.tokens[i, step.block]).any()
        for i in seen.steps
        for step in seen.steps[i][:-1]
    )


def test_tokens_shown_are_of_the_image_that_is_told(wide: tuple[Path, Path]) -> None:
    """Images that go through the blocks side by side have memory of their own."""
    runtime, images = adavit.load(wide[0], threads=2, parallel="samples", specialise=False), random_images(WIDE, 9)
    together, alone = Seen(), [Seen() for _ in images]
    runtime.run(images, observe=together)
    for row, seen in enumerate(alone):
        runtime.run(images[row : row + 1], observe=seen)
        for found, wanted in zip(together.steps[row], seen.steps[0], strict=True):
            np.testing.assert_allclose(found.tokens, wanted.tokens, atol=1e-5)
