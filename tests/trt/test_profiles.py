import math

import pytest
from cases import random_policy, tiny
from hypothesis import given
from hypothesis import strategies as st

from adavit.bundle.bundle import EngineSpec, TensorSpec
from adavit.statistics import Statistics
from adavit.tensorrt.profiles import PAYS, Range, profiles_of, split

ARCH = tiny(image_size=224, patch_size=16, heads=6)


def engine(name: str, **inputs: tuple[int | str, ...]) -> EngineSpec:
    tensors = tuple(TensorSpec(key, "float32", shape) for key, shape in inputs.items())
    return EngineSpec(name, f"onnx/{name}.onnx", tensors, (), 1, "")


ATTENTION = engine("blocks.1.attention_gather", x=("K", 48), qkv=("h", 48, 24), proj=("c", 48))


def statistics(tokens: dict[int, int], heads: dict[int, int], batch: dict[int, int]) -> Statistics:
    return Statistics(({},) + (tokens,) * 2, ({},) + (heads,) * 2, batch)


def test_without_statistics_an_engine_is_tuned_for_one_image_every_token_and_half_the_heads() -> None:
    assert profiles_of(engine("stem", images=("B", 3, 224, 224)), ARCH, None, 16) == [
        {"images": ((1, 3, 224, 224), (1, 3, 224, 224), (16, 3, 224, 224))}
    ]
    assert profiles_of(ATTENTION, ARCH, None, 16) == [
        {
            "x": ((1, 48), (197, 48), (197, 48)),
            "qkv": ((1, 48, 24), (3, 48, 24), (6, 48, 24)),
            "proj": ((8, 48), (24, 48), (48, 48)),
        }
    ]
    assert profiles_of(engine("empty"), ARCH, None, 16) == [{}]


def test_with_statistics_it_is_tuned_for_where_the_mass_is() -> None:
    found = profiles_of(ATTENTION, ARCH, statistics({120: 8, 197: 1}, {2: 5, 4: 1, 0: 100}, {1: 1}), 16)
    assert found == [
        {
            "x": ((1, 48), (120, 48), (197, 48)),
            "qkv": ((1, 48, 24), (2, 48, 24), (6, 48, 24)),
            "proj": ((8, 48), (16, 48), (48, 48)),
        }
    ]


def test_sizes_far_apart_get_a_profile_each_that_meet() -> None:
    found = profiles_of(ATTENTION, ARCH, statistics({20: 50, 21: 50, 197: 100}, {3: 1}, {1: 1}), 16)
    assert [profile["x"] for profile in found] == [((1, 48), (20, 48), (21, 48)), ((22, 48), (197, 48), (197, 48))]
    assert {profile["qkv"] for profile in found} == {((1, 48, 24), (3, 48, 24), (6, 48, 24))}
    batches = profiles_of(engine("head", x=("B", 48)), ARCH, statistics({}, {}, {1: 9, 32: 9}), 64)
    assert [profile["x"] for profile in batches] == [((1, 48), (1, 48), (1, 48)), ((2, 48), (32, 48), (64, 48))]


def test_engines_of_a_block_go_by_what_that_block_kept() -> None:
    found = Statistics(({}, {120: 8}, {20: 8, 40: 0}), ({}, {2: 1}, {5: 1}), {1: 1})
    tuned = []
    for block in range(3):
        spec = engine(f"blocks.{block}.attention_gather", x=("K", 48), qkv=("h", 48, 24))
        (profile,) = profiles_of(spec, ARCH, found, 16)
        tuned.append((profile["x"][1][0], profile["qkv"][1][0]))
    assert tuned == [(197, 3), (120, 2), (20, 5)]  # the first block has seen nothing
    never = Statistics(({90: 0},) * 3, ({1: 0},) * 3, {1: 1})
    assert [profile["x"][1] for profile in profiles_of(ATTENTION, ARCH, never, 16)] == [(197, 48)]


def test_only_the_first_dimension_is_split() -> None:
    (found,) = profiles_of(ATTENTION, ARCH, statistics({197: 1}, {1: 50, 6: 50}, {1: 1}), 16)
    assert found["qkv"] == ((1, 48, 24), (1, 48, 24), (6, 48, 24))


def test_engines_of_no_block_go_by_all_blocks() -> None:
    found = profiles_of(engine("rows.gather", x=(197, 48), kept=("K",)), ARCH, statistics({90: 1}, {}, {1: 1}), 16)
    assert [profile["kept"] for profile in found] == [((1,), (90,), (197,))]


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
    with pytest.raises(ValueError, match="engine odd has a dimension 'Z'"):
        profiles_of(engine("odd", x=("Z", 4)), ARCH, None, 16)


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
