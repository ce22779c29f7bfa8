"""Capacities: that random batches fit, that no size is impossible, and that tables which overflow often grow."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cases import random_policy, read_config, tiny, write_config

from adavit.architecture import Architecture
from adavit.bundle.bundle import Bundle
from adavit.bundle.demo import demo_bundle
from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.bundle.statistics import policy_at, write_statistics
from adavit.macs import batch_macs, block_macs
from adavit.runtime import Policy
from adavit.runtime.batch import Room, rooms_of
from adavit.runtime.capacity import CapacityTable, capacity_table

DEEP = tiny(depth=6, image_size=64)
LOW, HIGH = Offsets(-2.0, -4.0, -1.0), Offsets(8.0, 0.0, 2.0)


def drawn(arch: Architecture, images: int, seed: int) -> Policy:
    """Policies as trained models have them: harder images keep more, in every block; some sub-layers hardly ever run.

    Args:
        arch: the model's shapes.
        images: how many.
        seed: of the images; all are of one model.
    """
    source, model = np.random.default_rng(seed), np.random.default_rng(0)
    hard = source.random((images, 1, 1))

    def mask(size: int) -> np.ndarray:
        mean = model.choice([0.003, 0.2, 0.5, 0.9], (1, arch.depth, size))
        return source.random((images, arch.depth, size)) < mean * (0.6 + 0.8 * hard)

    policy = Policy(mask(arch.tokens), mask(arch.heads), mask(2))
    policy.tokens[..., 0] = True
    for masks in (policy.heads, policy.sublayers):
        masks[:, : arch.keep] = True
    return policy


def fits(needed: list[Room], rooms: list[Room]) -> bool:
    return bool((np.array(needed) <= np.array(rooms)).all())


def overflowing(policy: Policy, rooms: list[Room], batch: int, batches: int = 500) -> float:
    """The share of random batches that do not fit."""
    source = np.random.default_rng(9)
    some = [policy[source.integers(len(policy), size=batch)] for _ in range(batches)]
    return float(np.mean([not fits(rooms_of(policy), rooms) for policy in some]))


def padding(arch: Architecture, policy: Policy, rooms: list[Room], batch: int) -> float:
    """What is multiplied, of what the images ask for."""
    runs = policy.sublayers.astype(int)
    asked = block_macs(arch, policy.tokens.sum(2), policy.heads.sum(2), runs[..., 0], runs[..., 1]).sum(1).mean()
    return sum(batch_macs(arch, *room) for room in rooms) / (batch * float(asked))


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_batches_of_other_images_fit(batch: int) -> None:
    rooms = CapacityTable(DEEP, [drawn(DEEP, 256, 1)], 0.985).rooms(batch)
    everything = padding(DEEP, others := drawn(DEEP, 2000, 2), rooms_of(Policy.dense(DEEP, batch)), batch)
    assert overflowing(others, rooms, batch) <= 0.03
    assert padding(DEEP, others, rooms, batch) < 0.8 * everything


def test_a_lower_quantile_pads_less_and_overflows_more() -> None:
    images, others = drawn(DEEP, 256, 1), drawn(DEEP, 2000, 2)
    most, least = (CapacityTable(DEEP, [images], quantile).rooms(8) for quantile in (0.999, 0.7))
    assert padding(DEEP, others, least, 8) < padding(DEEP, others, most, 8)
    assert overflowing(others, most, 8) <= 0.02 < 0.2 < overflowing(others, least, 8) < 0.4


def test_a_sublayer_that_no_calibration_image_runs_has_room_for_one_image() -> None:
    images = Policy.dense(DEEP, 40)
    images.sublayers[:, 3] = False
    assert CapacityTable(DEEP, [images], 0.985).rooms(16)[3].mlp_rows >= DEEP.tokens
    assert CapacityTable(DEEP, [images], 0.985).rooms(16)[3].attention_images >= 1


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_no_size_is_less_than_one_or_more_than_a_batch_can_need(batch: int) -> None:
    arch, most = tiny(), rooms_of(Policy.dense(tiny(), batch))
    for images in (random_policy(arch, 5, 1), Policy.dense(arch, 3)):
        for quantile in (0.5, 1.0):
            rooms = CapacityTable(arch, [images], quantile).rooms(batch)
            assert all(min(room) >= 1 for room in rooms)
            assert fits(rooms, most)


def test_a_table_is_the_same_again_and_for_all_threads() -> None:
    table = CapacityTable(DEEP, [drawn(DEEP, 64, 1)], 0.985)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(table.rooms, [4, 8] * 8))
    assert found[::2] == [found[0]] * 8 and found[1::2] == [found[1]] * 8
    assert CapacityTable(DEEP, [drawn(DEEP, 64, 1)], 0.985).rooms(4) == found[0]


def needs(policy: Policy) -> np.ndarray:
    return np.array(rooms_of(policy))


def test_a_table_that_overflows_often_grows() -> None:
    table, much = CapacityTable(DEEP, [drawn(DEEP, 64, 1)], 0.985), needs(Policy.dense(DEEP, 8))
    before, other = table.rooms(8), table.rooms(4)
    for _ in range(2):
        table.note(8, much)
    assert (table.version(8), table.rooms(8)) == (0, before)
    table.note(8, much + 100)
    assert table.version(8) == 1
    np.testing.assert_array_equal(table.rooms(8), much)  # and not more than a batch can need
    assert (table.version(4), table.rooms(4)) == (0, other)


def test_a_table_that_overflows_seldom_stays() -> None:
    table, much = CapacityTable(DEEP, [drawn(DEEP, 64, 1)], 0.985), needs(Policy.dense(DEEP, 8))
    before = table.rooms(8)
    for number in range(400):
        table.note(8, None if number % 40 else much)
    assert (table.version(8), table.rooms(8)) == (0, before)


def bundle_at(bundle: Path, policies: list[Policy], **changes: object) -> Bundle:
    """The bundle with three operating points, and with what images keep at the trained one, the lowest and the highest.

    `changes` are of `config.json`.
    """
    points = [
        {"budget": budget, "offsets": vars(offsets), "measured": {}}
        for budget, offsets in ((0.2, LOW), (0.5, TRAINED), (0.9, HIGH))
    ]
    changes |= {"budgets": {"points": points, "calibration": {}}}
    write_config(bundle, read_config(bundle) | changes | {"statistics": vars(write_statistics(bundle, policies))})
    return Bundle.open(bundle)


def test_between_two_points_the_larger_sizes(bundle: Path) -> None:
    policies = [random_policy(tiny(), 30, seed) for seed in range(3)]
    opened = bundle_at(bundle, policies)
    trained, low, high = (needs for needs in (CapacityTable(tiny(), [p], 0.985).rooms(4) for p in policies))

    def rooms(offsets: Offsets) -> list[Room]:
        table = capacity_table(opened, offsets)
        assert table is not None
        return table.rooms(4)

    assert (rooms(TRAINED), rooms(LOW), rooms(HIGH)) == (trained, low, high)
    for share in (0.1, 0.9):
        np.testing.assert_array_equal(rooms(LOW.toward(TRAINED, share)), np.maximum(low, trained))
        np.testing.assert_array_equal(rooms(TRAINED.toward(HIGH, share)), np.maximum(high, trained))
    assert rooms(Offsets(8.0, 0.5, 2.0)) == high


def test_a_table_is_at_the_quantile_of_its_bundle(bundle: Path) -> None:
    policies = [drawn(tiny(), 60, seed) for seed in range(3)]
    table = capacity_table(bundle_at(bundle, policies, capacity_quantile=0.6), TRAINED)
    assert table is not None
    assert table.rooms(8) == CapacityTable(tiny(), policies[:1], 0.6).rooms(8)
    assert table.rooms(8) != CapacityTable(tiny(), policies[:1], 0.985).rooms(8)


def test_without_statistics_there_is_no_table(bundle: Path) -> None:
    assert capacity_table(Bundle.open(bundle), TRAINED) is None


@pytest.mark.parametrize(("budget", "most", "exact"), [(None, 1.5, 1.12), (0.35, 1.65, 1.18)])
def test_padding_of_the_demo(budget: float | None, most: float, exact: float) -> None:
    """Half of its calibration images make the table, batches are of the other half."""
    bundle = Bundle.open(demo_bundle())
    assert bundle.budgets is not None
    policy = policy_at(bundle, TRAINED if budget is None else bundle.budgets.offsets(budget))
    assert policy is not None
    half, others = policy[::2], policy[1::2]
    arch = bundle.architecture
    rooms = CapacityTable(arch, [half], bundle.capacity_quantile).rooms(32)
    assert padding(arch, others, rooms, 32) <= most
    assert overflowing(others, rooms, 32) <= 0.1
    source = np.random.default_rng(0)
    batches = [others[source.permutation(len(others))[:32]] for _ in range(100)]
    assert np.mean([padding(arch, batch, rooms_of(batch), 32) for batch in batches]) <= exact
