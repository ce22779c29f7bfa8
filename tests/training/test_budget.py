import numpy as np
import pytest
from training_cases import tiny

from adavit.architecture import Architecture
from adavit.errors import OptionError
from adavit.macs import dense_macs, image_macs
from adavit.training.budget import KINDS, expected_share, targets_for
from adavit.training.errors import TrainingError

ARCH = Architecture("patch", 28, 2, 192, 8, 4, 576, 10, 1, True, True, True, True)


def test_full_usage_is_the_dense_model() -> None:
    assert expected_share(ARCH, {}) == pytest.approx(1)


def test_whole_counts_agree_with_the_cost_model() -> None:
    tokens, heads = np.zeros((1, 8, 197), bool), np.ones((1, 8, 4), bool)
    tokens[:, :, : 1 + 98] = True
    heads[:, 1:, 2:] = False
    exact = image_macs(ARCH, tokens, heads, np.ones((1, 8, 2), bool))[0] / dense_macs(ARCH)
    assert expected_share(ARCH, {"tokens": 0.5, "heads": 0.5}) == pytest.approx(exact)


@pytest.mark.parametrize("policies", [KINDS, ("heads",), ("tokens", "sublayers")])
@pytest.mark.parametrize("budget", [0.7, 0.8])
def test_targets_meet_the_budget(policies: tuple[str, ...], budget: float) -> None:
    targets = targets_for(ARCH, policies, budget, {})
    assert set(targets) == set(policies)
    assert expected_share(ARCH, targets) == pytest.approx(budget, abs=1e-6)


def test_a_fixed_target_is_kept() -> None:
    targets = targets_for(ARCH, KINDS, 0.46, {"tokens": 0.6})
    assert targets["tokens"] == 0.6 and targets["heads"] == targets["sublayers"]
    assert expected_share(ARCH, targets) == pytest.approx(0.46, abs=1e-6)


def test_unreachable_and_overdetermined_budgets_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"0\.05 is out of reach"):
        targets_for(ARCH, ("heads",), 0.05, {})
    with pytest.raises(OptionError, match="every target is fixed"):
        targets_for(tiny(), ("heads",), 0.5, {"heads": 0.5})
