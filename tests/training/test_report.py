import json

import numpy as np
import pytest
import torch
from training_cases import tiny

from adavit.training.predict import Predictions
from adavit.training.report import RandomPolicy, evaluation_report

ARCH = tiny()


def predictions(n: int = 20) -> Predictions:
    """Images 0, 2, ... are easy, of class 0, and take fewer heads; head 3 of block 1 is never used."""
    hard = np.arange(n) % 2 == 1
    labels = hard.astype(np.int64)
    logits = np.zeros((n, 4), np.float32)
    logits[np.arange(n), labels] = np.where(hard, 0.1, 5.0)
    heads = np.ones((n, 3, 4), bool)
    heads[~hard, 2, :3] = False
    heads[:, 1, 3] = False
    sublayers = np.ones((n, 3, 2), bool)
    sublayers[::3, 1, 1] = False
    return Predictions(labels, logits, np.ones((n, 3, 17), bool), heads, sublayers, np.where(hard, 0.9, 0.4))


def test_a_report_tells_classes_difficulty_and_what_never_changes() -> None:
    found = predictions()
    report = evaluation_report(found, ARCH, ["easy", "hard", "c", "d"])
    assert json.loads(json.dumps(report)) == report
    assert (report["accuracy"], report["macs"]) == (1.0, pytest.approx(0.65))
    assert [row["macs"] for row in report["classes"]] == [pytest.approx(0.4), pytest.approx(0.9), 0.0, 0.0]
    assert report["classes"][2]["accuracy"] is None
    assert report["difficulty"]["parts"][0]["macs"] == pytest.approx(0.4)
    assert report["difficulty"]["parts"][-1]["macs"] == pytest.approx(0.9)
    assert report["difficulty"]["rank_correlation"] > 0.7
    assert report["constant"]["never"] == ["block 1 head 3"]
    assert "block 1 attention" in report["constant"]["always"]
    assert "block 2 head 0" not in report["constant"]["always"]
    assert "block 1 MLP" not in report["constant"]["always"]


def test_what_ran_for_every_image_is_told_of_blocks_that_ran() -> None:
    found = predictions()
    found.sublayers[::2, 2] = False  # of whose heads the policy keeps some
    constant = evaluation_report(found, ARCH, ["easy", "hard", "c", "d"])["constant"]
    assert not [unit for unit in constant["always"] if unit.startswith("block 2")]
    found.sublayers[:, 1] = False
    constant = evaluation_report(found, ARCH, ["easy", "hard", "c", "d"])["constant"]
    assert {f"block 1 head {head}" for head in range(4)} < set(constant["never"])


def test_heads_are_weighed_by_the_sublayers_that_run() -> None:
    found = predictions(2)
    usage = found.target_usage(ARCH.keep)
    running, means = np.array([[1, 2], [2, 2]]), np.array([[0.75, 0.25], [0.75, 1.0]])
    assert usage["heads"] == pytest.approx(float((running * means).sum() / running.sum()))


def test_loss_is_the_cross_entropy() -> None:
    found = predictions()
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(found.logits), torch.from_numpy(found.labels), reduction="none"
    )
    assert found.loss == pytest.approx(expected.numpy(), rel=1e-5)


def test_a_random_policy_uses_as_much_of_each_block() -> None:
    found = predictions()
    policy = RandomPolicy(found, ARCH, 0)
    asked = [(4000, 16), *[(4000, 16), (4000, 4), (4000, 2)] * 2]
    drawn = RandomPolicy(found, ARCH, 0).policy(4000)
    assert drawn.tokens.all() and drawn.heads[:, 0].all() and drawn.sublayers[:, 0].all()
    assert drawn.heads.mean((0, 2)) == pytest.approx(found.heads.mean((0, 2)), abs=0.03)
    for _ in range(2):  # a second forward starts again with the first block
        means = [float(policy(torch.zeros(shape), 0.5).mean()) for shape in asked]
        expected = [1, 1, 0.75, found.sublayers[:, 1].mean(), 1, found.heads[:, 2].mean(), 1]
        assert means == pytest.approx(expected, abs=0.03)
