"""Bundles against what the released implementation computed, however they are run."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import GOLDEN, GOLDEN_FILES, assert_same_policy, golden, python

import adavit
from adavit.macs import dense_macs, image_macs
from adavit.model import load_checkpoint
from adavit.runtime import Runtime

Bundles = Callable[[str], Path]


@pytest.fixture(scope="module", params=GOLDEN_FILES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


BACKENDS = [("onnxruntime", None), ("openvino", "fp32")]


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda backend: backend[0])
def loaded(name: str, request: pytest.FixtureRequest, golden_bundles: Bundles) -> Runtime:
    backend, provider = request.param
    return adavit.load(golden_bundles(name), backend=backend, provider=provider, threads=1, specialise=False)


def test_decisions_logits_and_macs(name: str, loaded: Runtime) -> None:
    images, logits, policy = golden(name)
    result = loaded.run(images)
    assert_same_policy(result.policy, policy)
    np.testing.assert_allclose(result.logits, logits, atol=1e-4, rtol=0)
    assert result.logits.dtype == np.float32
    assert result.macs.dtype == np.int64
    assert (
        result.macs.tolist() == image_macs(loaded.architecture, policy.tokens, policy.heads, policy.sublayers).tolist()
    )
    assert (result.macs < dense_macs(loaded.architecture)).all()


def test_each_image_of_a_batch_is_as_alone(name: str, loaded: Runtime) -> None:
    images, _, _ = golden(name)
    together = loaded.run(images)
    for position in range(len(images)):
        alone = loaded.run(images[position : position + 1])
        assert_same_policy(alone.policy, together.policy[position : position + 1])
        np.testing.assert_allclose(alone.logits[0], together.logits[position], atol=1e-4, rtol=0)
        assert alone.macs[0] == together.macs[position]


def test_replaying_the_recorded_policy_gives_the_same(name: str, loaded: Runtime) -> None:
    images, logits, policy = golden(name)
    decided, replayed = loaded.run(images), loaded.run(images, policy=policy)
    assert_same_policy(replayed.policy, policy)
    np.testing.assert_allclose(replayed.logits, logits, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(replayed.logits, decided.logits)
    np.testing.assert_array_equal(replayed.macs, decided.macs)


def test_the_dense_twin_keeps_everything(name: str, loaded: Runtime) -> None:
    import torch

    images, _, _ = golden(name)
    model = load_checkpoint(GOLDEN / GOLDEN_FILES[name])
    with torch.no_grad():
        wanted = model(torch.from_numpy(images), decide=None).logits.numpy()
    np.testing.assert_allclose(loaded.run_dense(images), wanted, atol=1e-4, rtol=0)
    everything = adavit.Policy.dense(loaded.architecture, len(images))
    replayed = loaded.run(images, policy=everything)
    np.testing.assert_allclose(replayed.logits, wanted, atol=1e-4, rtol=0)
    assert set(replayed.macs.tolist()) == {dense_macs(loaded.architecture)}


def test_what_is_prepared_computes_the_same(name: str, loaded: Runtime) -> None:
    images, logits, policy = golden(name)
    try:
        assert loaded.specialise(policy) > 0
        assert loaded.backend.prepared()
        for result in (loaded.run(images), loaded.run(images, policy=policy)):
            assert_same_policy(result.policy, policy)
            np.testing.assert_allclose(result.logits, logits, atol=1e-4, rtol=0)
    finally:
        loaded.backend.retain(())
    assert not loaded.backend.prepared()
    np.testing.assert_allclose(loaded.run(images).logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("backend", "provider"), BACKENDS)
@pytest.mark.parametrize("parallel", ["operators", "samples", "auto"])
def test_every_way_to_share_threads_in_a_process_that_has_its_pool(
    parallel: str, backend: str, provider: str | None, name: str, golden_bundles: Bundles
) -> None:
    images, logits, policy = golden(name)
    loaded = adavit.load(golden_bundles(name), backend=backend, provider=provider, threads=2, parallel=parallel)
    for _ in range(2):
        result = loaded.run(images)
        assert_same_policy(result.policy, policy)
        np.testing.assert_allclose(result.logits, logits, atol=1e-4, rtol=0)


FRESH = """
import json, sys
import numpy as np
if sys.argv[1] == "application's pool":
    import onnxruntime
    onnxruntime.set_global_thread_pool_sizes(1, 1)
import adavit
for case in json.loads(sys.argv[3]):
    data, images = np.load(case["npz"]), np.load(case["images"])["images"]
    runtime = adavit.load(case["bundle"], threads=2, parallel=sys.argv[2])
    result = runtime.run(np.tile(images, (2, 1, 1, 1)))
    adapted = data["head_select"].shape[1]
    assert (result.policy.tokens == np.tile(data["token_select"] > 0, (2, 1, 1))).all()
    assert (result.policy.heads[:, -adapted:] == np.tile(data["head_select"] > 0, (2, 1, 1))).all()
    assert (result.policy.sublayers[:, -adapted:] == np.tile(data["layer_select"] > 0, (2, 1, 1))).all()
    assert np.abs(result.logits - np.tile(data["logits"], (2, 1))).max() < 1e-4
print("right")
"""


@pytest.mark.parametrize("parallel", ["operators", "samples", "auto"])
@pytest.mark.parametrize("pool", ["no pool", "application's pool"])
def test_every_way_to_share_threads_in_a_fresh_process(parallel: str, pool: str, golden_bundles: Bundles) -> None:
    cases = [
        {
            "npz": str(GOLDEN / f"{name}.npz"),
            "images": str(GOLDEN / f"{'deit_small' if name == 't2t_small' else name}.npz"),
            "bundle": str(golden_bundles(name)),
        }
        for name in GOLDEN_FILES
    ]
    done = python(FRESH, pool, parallel, json.dumps(cases))
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
