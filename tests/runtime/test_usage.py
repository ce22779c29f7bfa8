"""What images used, as it is kept for the next start."""

import json
from dataclasses import replace

import numpy as np
from cases import WIDE, tiny

from adavit.runtime.cache import MAX_FILE
from adavit.runtime.policy import Policy
from adavit.runtime.specialise import usage_from, usage_of, usage_to

IMAGES = 1024


def test_the_usage_of_many_different_images_fits_a_file_of_the_cache() -> None:
    arch = replace(WIDE, depth=24)
    source = np.random.default_rng(0)
    shapes = (arch.tokens,), (arch.heads,), (2,)
    policy = Policy(*(source.random((IMAGES, arch.depth, *shape)) < 0.8 for shape in shapes))
    kept = usage_to(usage_of(policy, 2))
    assert len(json.dumps({"usage": kept}, indent=2)) < MAX_FILE
    assert usage_from(kept, arch)


def test_a_kept_usage_has_the_mean_of_tokens() -> None:
    arch = tiny()
    policy = Policy.dense(arch, 2)
    policy.tokens[1, :, 1:] = False
    usage = usage_from(usage_to(usage_of(policy, 1)), arch)
    assert {use.tokens for use in usage} == {round((arch.tokens + 1) / 2)}
    assert set(usage.values()) == {1.0} and len(usage) == arch.depth
