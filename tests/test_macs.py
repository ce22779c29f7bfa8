"""The cost model against the released table, and against a count by hand."""

from dataclasses import replace

import numpy as np
import pytest
from cases import random_policy, tiny

from adavit.macs import attention_macs, batch_macs, block_macs, dense_macs, image_macs, mlp_macs, outside_macs

T2T_19 = tiny(
    stem="t2t", image_size=224, patch_size=16, width=448, depth=19, heads=7, hidden=1344, classes=1000, qkv_bias=False
)
DEIT_S = tiny(image_size=224, patch_size=16, width=384, depth=12, heads=6, hidden=1536, classes=1000)


UNIT = 0.0011
"""The released table has three digits, and counts a little beside matrix products."""


@pytest.mark.parametrize(
    ("arch", "attention", "mlp", "block"), [(T2T_19, 0.194, 0.238, 0.431), (DEIT_S, 0.147, 0.233, 0.379)]
)
def test_the_released_table(arch, attention: float, mlp: float, block: float) -> None:
    everything = arch.tokens, arch.heads
    assert attention_macs(arch, *everything) / 1e9 == pytest.approx(attention, abs=UNIT)
    assert mlp_macs(arch, *everything) / 1e9 == pytest.approx(mlp, abs=UNIT)
    assert block_macs(arch, *everything, 1, 1) / 1e9 == pytest.approx(block, abs=UNIT)


@pytest.mark.parametrize(("arch", "dense", "outside"), [(T2T_19, 8.5, 0.33), (DEIT_S, 4.6, 0.06)])
def test_whole_models(arch, dense: float, outside: float) -> None:
    assert round(dense_macs(arch) / 1e9, 1) == dense
    assert outside_macs(arch) / 1e9 == pytest.approx(outside, rel=0.1)


def test_nothing_is_counted_for_what_does_not_run() -> None:
    arch = tiny()
    assert block_macs(arch, 17, 0, 1, 1) == 0
    assert block_macs(arch, 17, 3, 0, 0) == 0
    assert block_macs(arch, 9, 2, 1, 0) == attention_macs(arch, 9, 2) > 0
    assert block_macs(arch, 9, 2, 0, 1) == mlp_macs(arch, 9, 2) > 0


def test_attention_and_mlp_by_hand() -> None:
    arch = tiny()  # width 48, 3 heads of 16 channels, hidden 80
    assert attention_macs(arch, 5, 2) == 5 * (3 * 48 * 32 + 32 * 48) + 2 * 25 * 32
    assert mlp_macs(arch, 5, 2) == 5 * (32 * 80 + 80 * 48)
    assert outside_macs(arch) == 16 * 48 * 3 * 64 + 48 * 5


def test_an_image_is_the_sum_of_its_blocks() -> None:
    arch = replace(tiny(), keep=0)
    policy = random_policy(arch, 4, seed=3)
    wanted = [
        outside_macs(arch)
        + sum(
            block_macs(
                arch,
                int(policy.tokens[image, block].sum()),
                int(policy.heads[image, block].sum()),
                *map(int, policy.sublayers[image, block]),
            )
            for block in range(arch.depth)
        )
        for image in range(4)
    ]
    found = image_macs(arch, policy.tokens, policy.heads, policy.sublayers)
    assert found.dtype == np.int64
    assert found.tolist() == wanted
    assert len(set(wanted)) > 1


def test_a_batch_by_hand() -> None:
    arch = tiny()  # width 48, 3 heads of 16 channels, hidden 80
    linear, products, mlp = 7 * 4 * 48 * 48, 2 * 2 * 5 * 5 * 48, 9 * 80 * (48 + 48)
    assert batch_macs(arch, 7, 2, 5, 9) == linear + products + mlp
    linear, products, mlp = 7 * 4 * 48 * 32, 2 * 2 * 5 * 5 * 32, 9 * 80 * (32 + 48)
    assert batch_macs(arch, 7, 2, 5, 9, heads=2) == linear + products + mlp
    rows = np.array([7, 1])
    assert batch_macs(arch, rows, rows, rows, rows).tolist() == [batch_macs(arch, *[n] * 4) for n in (7, 1)]


def test_a_batch_of_one_image_pads_nothing() -> None:
    arch = tiny()
    assert batch_macs(arch, 9, 1, 9, 9, heads=2) == block_macs(arch, 9, 2, 1, 1)
