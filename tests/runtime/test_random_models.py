"""Properties of any AdaViT: exported and run, it computes what the masked model computes."""

import tempfile
from pathlib import Path

import numpy as np
from cases import (
    DROP_ALL,
    KEEP_ALL,
    WIDE,
    assert_same_policy,
    export,
    forced,
    oracle,
    random_images,
    random_model,
    random_policy,
    tiny,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strategies import BIASES, architectures

import adavit
from adavit.architecture import Architecture
from adavit.macs import image_macs
from adavit.model import AdaViT
from adavit.runtime import Policy, Result, Runtime

SAFE = 1e-4
"""An image whose decisions come closer to a threshold than this may decide either way."""
TOLERANCE = 1e-4


EVERYTHING = {"tokens": KEEP_ALL, "heads": KEEP_ALL, "sublayers": KEEP_ALL}
T2T = tiny(stem="t2t", patch_size=16, image_size=48, width=96, heads=6, keep=0, qkv_bias=False)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(architectures(), st.integers(0, 1000), BIASES, st.sampled_from([17, 18, 20, 23]))
@example(tiny(), 0, EVERYTHING, 20)
@example(tiny(), 0, {"heads": DROP_ALL}, 17)
@example(T2T, 1, {"heads": DROP_ALL}, 20)
@example(tiny(), 1, {"sublayers": DROP_ALL}, 20)
@example(tiny(), 2, {"tokens": DROP_ALL}, 20)
@example(tiny(keep=0), 3, {"tokens": DROP_ALL, "heads": DROP_ALL, "sublayers": DROP_ALL}, 17)
@example(T2T, 4, {}, 17)
@example(WIDE, 6, {"tokens": KEEP_ALL, "sublayers": KEEP_ALL}, 20)
@example(WIDE, 7, {"sublayers": KEEP_ALL}, 17)
@example(tiny(width=16, heads=1, qkv_bias=False), 8, {}, 20)
@example(tiny(keep=2), 9, {}, 20)
@example(tiny(depth=1, keep=0), 10, {}, 23)
@example(tiny(head_policy=False, sublayer_policy=False, image_size=8), 11, {}, 20)
@example(tiny(token_policy=False, head_policy=False, sublayer_policy=False), 5, {}, 20)
def test_a_bundle_is_its_model(arch: Architecture, seed: int, biases: dict[str, float], opset: int) -> None:
    model, images = random_model(arch, seed, **biases), random_images(arch, 3, seed)
    with tempfile.TemporaryDirectory() as folder:
        # Verification is one more run against the oracle, and refuses models whose decisions rounding may tip.
        bundle = export(model, Path(folder), opset=opset, verify=False)
        runtime = adavit.load(bundle, threads=1, specialise=False)
        both = adavit.load(bundle, threads=2, parallel=("auto", "samples", "operators")[seed % 3], specialise=False)
    assert runtime.architecture == arch
    assert_runs_as_decided(model, runtime, images)
    assert_replays(model, runtime, images, seed)
    assert_replays(model, both, images, seed)
    assert_prepared_is_the_same(model, runtime, images, seed)


def assert_runs_as_decided(model: AdaViT, runtime: Runtime, images: np.ndarray) -> None:
    logits, policy, margin = oracle(model, images)
    result = runtime.run(images)
    safe = np.flatnonzero(margin > SAFE)
    assert_same_policy(result.policy[safe], policy[safe])
    np.testing.assert_allclose(result.logits[safe], logits[safe], atol=TOLERANCE, rtol=0)
    assert_counts_what_it_used(runtime, result)
    replayed = runtime.run(images, policy=result.policy)
    np.testing.assert_allclose(replayed.logits, result.logits, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(replayed.macs, result.macs)


def assert_replays(model: AdaViT, runtime: Runtime, images: np.ndarray, seed: int) -> None:
    policy = random_policy(model.arch, len(images), seed)
    result = runtime.run(images, policy=policy)
    assert_same_policy(result.policy, policy)
    np.testing.assert_allclose(result.logits, forced(model, images, policy), atol=TOLERANCE, rtol=0)
    assert_counts_what_it_used(runtime, result)


def assert_prepared_is_the_same(model: AdaViT, runtime: Runtime, images: np.ndarray, seed: int) -> None:
    shared, policy = runtime.run(images), random_policy(model.arch, len(images), seed)
    count = runtime.specialise(Policy.concatenate([policy, shared.policy]))
    assert (count > 0) == model.arch.adapts
    prepared = runtime.run(images)
    _, _, margin = oracle(model, images)
    safe = np.flatnonzero(margin > SAFE)
    assert_same_policy(prepared.policy[safe], shared.policy[safe])
    np.testing.assert_allclose(prepared.logits[safe], shared.logits[safe], atol=TOLERANCE, rtol=0)
    assert_replays(model, runtime, images, seed)


def assert_counts_what_it_used(runtime: Runtime, result: Result) -> None:
    used = result.policy
    wanted = image_macs(runtime.architecture, used.tokens, used.heads, used.sublayers)
    np.testing.assert_array_equal(result.macs, wanted)


def test_the_extremes_are_what_they_say() -> None:
    images = random_images(tiny(), 2)
    for value, share in ((KEEP_ALL, 1.0), (DROP_ALL, 0.0)):
        _, policy, _ = oracle(random_model(tiny(), 0, tokens=value, heads=value, sublayers=value), images)
        assert set(policy.tokens[..., 1:].ravel().tolist()) == {bool(share)}
        assert policy.heads[:, 1:].mean() == policy.sublayers[:, 1:].mean() == share


def test_random_models_decide_both_ways() -> None:
    policies = [oracle(random_model(tiny(), seed), random_images(tiny(), 3))[1] for seed in range(4)]
    for kind in ("tokens", "heads", "sublayers"):
        share = np.mean([getattr(policy, kind)[:, 1:].mean() for policy in policies])
        assert 0.1 < share < 0.95
