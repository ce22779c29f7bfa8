"""The masked model against what the released implementation computed, and its dense twin."""

import numpy as np
import pytest
import torch
from cases import GOLDEN, GOLDEN_FILES, KEEP_ALL, assert_same_policy, golden, oracle, random_images, random_model, tiny

from adavit.model import load_checkpoint


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_the_oracle_computes_the_golden_vectors(name: str) -> None:
    images, logits, policy = golden(name)
    found, decided, margin = oracle(load_checkpoint(GOLDEN / GOLDEN_FILES[name]), images)
    assert margin.min() > 0.002  # as promised of the vectors; a smaller one would prove little
    assert_same_policy(decided, policy)
    np.testing.assert_allclose(found, logits, atol=1e-4, rtol=0)


def test_the_dense_twin_is_the_model_that_keeps_everything() -> None:
    eager = random_model(tiny(), tokens=KEEP_ALL, heads=KEEP_ALL, sublayers=KEEP_ALL)
    images = torch.from_numpy(random_images(eager.arch, 2))
    torch.testing.assert_close(eager(images).logits, eager(images, decide=None).logits)
    assert not torch.allclose(random_model(tiny())(images).logits, random_model(tiny())(images, decide=None).logits)


def test_every_block_output_is_there_when_asked_for() -> None:
    model = random_model(tiny())
    output = model(torch.from_numpy(random_images(model.arch, 2)), hidden=True)
    assert [tuple(x.shape) for x in output.hidden] == [(2, 17, 48)] * 3
    torch.testing.assert_close(model.classify(output.hidden[-1]), output.logits)


def test_layer_norm_epsilon_follows_the_family() -> None:
    epsilons = {
        stem: {m.eps for n, m in random_model(tiny(stem=stem, patch_size=16)).named_modules() if "norm" in n}
        for stem in ("patch", "t2t")
    }
    assert epsilons == {"patch": {1e-6}, "t2t": {1e-5}}
