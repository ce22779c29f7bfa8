import math

import pytest
from cases import random_policy, tiny
from hypothesis import given
from hypothesis import strategies as st

from adavit.architecture import Architecture
from adavit.bundle.histograms import Statistics
from adavit.bundle.onnx_format import Value
from adavit.tensorrt.profiles import PAYS, Profile, Range, profiles_of, split

ARCH = tiny(image_size=224, patch_size=16, heads=6)
ATTENTION = dict(x=(197, 48), tokens=("K",), qkv=("3c", 48), qkv_bias=("3c",), proj=(48, "c"))
MLP = dict(x=(197, 48), tokens=("K",), heads=("h",), fc1=(80, "c"), fc2=(48, 80))
IMAGES = dict(images=("B", 3, 224, 224))


def profiles(
    inputs: dict[str, tuple[int | str, ...]],
    statistics: Statistics | None = None,
    max_batch: int = 16,
    block: int | None = 1,
    arch: Architecture = ARCH,
) -> list[Profile]:
    values = [Value(name, "float32", shape) for name, shape in inputs.items()]
    return profiles_of(values, block, arch, statistics, max_batch)


def statistics(tokens: dict[int, int], heads: dict[int, int], batch: dict[int, int]) -> Statistics:
    return Statistics(({},) + (tokens,) * 2, ({},) + (heads,) * 2, batch)


def test_without_statistics_an_engine_is_tuned_for_one_image_every_token_and_half_the_heads() -> None:
    assert profiles(IMAGES, block=None) == [{"images": ((1, 3, 224, 224), (1, 3, 224, 224), (16, 3, 224, 224))}]
    assert profiles(ATTENTION) == [
        {
            "x": ((197, 48), (197, 48), (197, 48)),
            "tokens": ((1,), (197,), (197,)),
            "qkv": ((24, 48), (72, 48), (144, 48)),
            "qkv_bias": ((24,), (72,), (144,)),
            "proj": ((48, 8), (48, 24), (48, 48)),
        }
    ]
    assert profiles(MLP) == [
        {
            "x": ((197, 48), (197, 48), (197, 48)),
            "tokens": ((1,), (197,), (197,)),
            "heads": ((1,), (3,), (6,)),
            "fc1": ((80, 8), (80, 24), (80, 48)),
            "fc2": ((48, 80), (48, 80), (48, 80)),
        }
    ]
    assert profiles(dict(x=(197, 48))) == [{"x": ((197, 48), (197, 48), (197, 48))}]


@pytest.mark.parametrize(("block", "arch"), [(0, ARCH), (2, tiny(head_policy=False, heads=6))])
def test_a_block_that_keeps_every_head_is_for_every_head(block: int, arch: Architecture) -> None:
    (found,) = profiles(ATTENTION, statistics({9: 1}, {2: 5}, {1: 1}), block=block, arch=arch)
    assert found["qkv"] == ((144, 48),) * 3
    assert found["proj"] == ((48, 48),) * 3


def test_with_statistics_it_is_tuned_for_where_the_mass_is() -> None:
    (found,) = profiles(ATTENTION, statistics({120: 8, 197: 1}, {2: 5, 4: 1, 0: 100}, {1: 1}))
    assert found["tokens"] == ((1,), (120,), (197,))
    assert found["qkv"] == ((24, 48), (48, 48), (144, 48))
    assert found["proj"] == ((48, 8), (48, 16), (48, 48))


def test_sizes_far_apart_get_a_profile_each_that_meet() -> None:
    found = profiles(ATTENTION, statistics({20: 50, 21: 50, 197: 100}, {3: 1}, {1: 1}))
    assert [profile["tokens"] for profile in found] == [((1,), (20,), (21,)), ((22,), (197,), (197,))]
    assert {profile["qkv"] for profile in found} == {((24, 48), (72, 48), (144, 48))}
    batches = profiles(IMAGES, statistics({}, {}, {1: 9, 32: 9}), 64, None)
    assert [tuple(shape[0] for shape in profile["images"]) for profile in batches] == [(1, 1, 1), (2, 32, 64)]


def test_engines_of_a_block_go_by_what_that_block_kept() -> None:
    found = Statistics(({}, {120: 8}, {20: 8, 40: 0}), ({}, {2: 1}, {5: 1}), {1: 1})
    tuned = []
    for block in range(3):
        (profile,) = profiles(MLP, found, block=block, arch=tiny(image_size=224, patch_size=16, heads=6, keep=0))
        tuned.append((profile["tokens"][1][0], profile["heads"][1][0]))
    assert tuned == [(197, 3), (120, 2), (20, 5)]  # the first block has seen nothing
    never = Statistics(({90: 0},) * 3, ({1: 0},) * 3, {1: 1})
    assert [profile["tokens"][1] for profile in profiles(ATTENTION, never)] == [(197,)]


def test_only_the_first_dimension_is_split() -> None:
    (found,) = profiles(ATTENTION, statistics({197: 1}, {1: 50, 6: 50}, {1: 1}))
    assert found["qkv"] == ((24, 48), (24, 48), (144, 48))


@given(st.dictionaries(st.integers(1, 300), st.integers(1, 1000), min_size=1, max_size=40))
def test_ranges_cover_every_size_once_and_a_cut_must_pay(sizes: dict[int, int]) -> None:
    found = split(sizes, 300, 3)
    assert 1 <= len(found) <= 3
    assert [r.least for r in found] == [1, *(r.most + 1 for r in found[:-1])]
    assert found[-1].most == 300
    assert all(r.least <= r.tuned <= r.most and r.tuned in sizes for r in found)

    def distance(ranges: list[Range]) -> float:
        return sum(
            count * min(abs(math.log2(size / r.tuned)) for r in ranges if r.least <= size <= r.most)
            for size, count in sizes.items()
        )

    saved = distance(split(sizes, 300, 1)) - distance(found)
    assert saved >= (len(found) - 1) * PAYS * sum(sizes.values()) - 1e-6


def test_an_unknown_dimension_is_named() -> None:
    with pytest.raises(ValueError, match="a graph has a dimension 'Z'"):
        profiles(dict(x=("Z", 4)))


def test_statistics_of_a_policy_count_the_images_that_run_a_block_and_survive_json() -> None:
    policy = random_policy(ARCH, 30, 0)
    found = Statistics.of(policy)
    for block in range(ARCH.depth):
        runs = policy.sublayers[:, block].any(1)
        assert sum(found.tokens[block].values()) == sum(found.heads[block].values()) == runs.sum()
        assert sum(k * n for k, n in found.tokens[block].items()) == policy.tokens[runs, block].sum()
        assert sum(k * n for k, n in found.heads[block].items()) == policy.heads[runs, block].sum()
    assert Statistics.from_dict(found.to_dict(), ARCH.depth) == found


@pytest.mark.parametrize(
    "damaged",
    [None, {}, {"tokens": [], "heads": [], "batch": {}}, {"tokens": 3}, {"batch": {"1": "x"}}, {"batch": {"a": 1}}],
)
def test_damaged_statistics_are_refused(damaged: object) -> None:
    good = Statistics.of(random_policy(ARCH, 3, 0)).to_dict()
    values = {**good, **damaged} if damaged else damaged
    with pytest.raises(ValueError):
        Statistics.from_dict(values, ARCH.depth)
