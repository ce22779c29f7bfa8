"""What calibration images kept: the stored points around some offsets, and the heads that are usual."""

from pathlib import Path

import numpy as np
import pytest
from cases import assert_same_policy, random_policy, read_config, tiny, write_config

from adavit.bundle.bundle import Bundle
from adavit.bundle.operating_points import TRAINED, Offsets
from adavit.bundle.policy import Policy
from adavit.bundle.statistics import operating_offsets, policies_around, policy_at, usual_heads, write_statistics
from adavit.errors import BundleError

LOW, HIGH = Offsets(-2.0, (-4.0, -3.0, -2.0), -1.0), Offsets(8.0, 0.0, 2.0)
POLICIES = {offsets: random_policy(tiny(), 9, seed) for seed, offsets in enumerate((TRAINED, LOW, HIGH))}


@pytest.fixture
def recorded(bundle: Path) -> Bundle:
    """A bundle with three operating points, and statistics of each."""
    points = [
        {"budget": budget, "offsets": vars(offsets), "measured": {}}
        for budget, offsets in ((0.2, LOW), (0.5, TRAINED), (0.9, HIGH))
    ]
    config = read_config(bundle) | {"budgets": {"points": points, "calibration": {}}}
    write_config(bundle, config | {"statistics": vars(write_statistics(bundle, list(POLICIES.values())))})
    return Bundle.open(bundle)


@pytest.mark.parametrize("offsets", POLICIES)
def test_at_a_stored_point_there_is_one(recorded: Bundle, offsets: Offsets) -> None:
    (found,) = policies_around(recorded, offsets)
    assert_same_policy(found, POLICIES[offsets])


@pytest.mark.parametrize("budget", [0.21, 0.35, 0.49, 0.51, 0.7, 0.89])
def test_a_budget_is_between_its_neighbours(recorded: Bundle, budget: float) -> None:
    assert recorded.budgets is not None
    found = policies_around(recorded, recorded.budgets.offsets(budget))
    wanted = (LOW, TRAINED) if budget < 0.5 else (TRAINED, HIGH)
    for policy, offsets in zip(found, wanted, strict=True):
        assert_same_policy(policy, POLICIES[offsets])


@pytest.mark.parametrize(
    ("offsets", "nearest"),
    [
        (Offsets(9.0, 0.0, 2.0), HIGH),
        (Offsets(16.0, 0.0, 4.0), HIGH),  # on the line, but beyond its end
        (Offsets(4.0, 0.1, 1.0), TRAINED),  # next to the line
        (Offsets(0.1, 0.1, 0.1), TRAINED),
        (Offsets(-2.0, -3.0, -1.0), LOW),
    ],
)
def test_other_offsets_are_at_the_nearest_point(recorded: Bundle, offsets: Offsets, nearest: Offsets) -> None:
    (found,) = policies_around(recorded, offsets)
    assert_same_policy(found, POLICIES[nearest])
    single = policy_at(recorded, offsets)
    assert single is not None
    assert_same_policy(single, found)


def test_a_bundle_without_statistics_has_none(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert policies_around(opened, TRAINED) == []
    assert policy_at(opened, TRAINED) is None


def test_damaged_statistics_are_refused(recorded: Bundle, bundle: Path) -> None:
    other = write_statistics(bundle, [POLICIES[TRAINED]] * (len(operating_offsets(recorded)) + 1))
    write_config(bundle, read_config(bundle) | {"statistics": vars(other)})
    with pytest.raises(BundleError, match="no statistics of this model"):
        policies_around(Bundle.open(bundle), TRAINED)


def heads_of(*kept: tuple[int, int]) -> Policy:
    """2,000 images that run everything; in the last block so many of them keep a head, and no others are kept."""
    policy = Policy.dense(tiny(), 2000)
    policy.heads[:, -1] = False
    for head, images in kept:
        policy.heads[:images, -1, head] = True
    return policy


def test_heads_that_hardly_any_image_keeps_are_not_usual() -> None:
    everything = (0, 1, 2)
    assert usual_heads([heads_of((1, 1500), (2, 2))]) == [everything, everything, (1,)]
    assert usual_heads([heads_of((1, 1500), (2, 3))]) == [everything, everything, (1, 2)]
    assert usual_heads([heads_of((1, 1500), (2, 3))], share=0.1)[-1] == (1,)


def test_a_head_is_usual_where_it_is_at_any_point() -> None:
    assert usual_heads([heads_of((1, 1500)), heads_of((0, 9))])[-1] == (0, 1)


def test_every_block_has_a_usual_head() -> None:
    assert usual_heads([heads_of((2, 1))])[-1] == (2,)
    assert len(usual_heads([heads_of()])[-1]) == 1


def test_heads_of_blocks_that_do_not_run_are_not_usual() -> None:
    policy = heads_of((0, 2000), (1, 2000))
    policy.sublayers[:, -1] = np.arange(2000)[:, None] < 1990
    policy.heads[:1990, -1, 0] = False
    assert usual_heads([policy])[-1] == (1,)
