"""The three ways to drive a batch, on a device that puts everything off."""

import gc
from pathlib import Path

import numpy as np
import pytest
from cases import assert_same_policy, random_images
from double import Gpu, add_double_engines

import adavit
from adavit.runtime import Runtime

TENSORRT = {"backend": "tensorrt", "trust_engines": True}


@pytest.mark.parametrize("way", ["exact", "conditional"])
def test_every_way_makes_what_the_cpu_makes(bundle: Path, runtime: Runtime, gpu: Gpu, way: str) -> None:
    on_gpu = adavit.load(add_double_engines(bundle), **TENSORRT, dispatch=way)
    for batch in (1, 5, 5, 5, 8, 1, 1, 11):
        images = random_images(runtime.architecture, batch, batch)
        found, wanted = on_gpu.run(images), runtime.run(images)
        assert_same_policy(found.policy, wanted.policy)
        np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)
    assert {ran.way for ran in on_gpu.dispatcher.ran} == {way}
    del on_gpu
    gc.collect()
    assert not gpu.memory
    assert set(gpu.alive.values()) == {0}
