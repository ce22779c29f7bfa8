"""Each term against its equation in closed form, and its gradient against finite differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adavit.training import losses


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_agrees(function: Callable[[Tensor], Tensor], at: Tensor) -> None:
    x = at.float().requires_grad_()
    (found,) = torch.autograd.grad(function(x), x)
    step = 1e-2
    for index in range(x.numel()):
        shift = torch.zeros_like(x.detach()).flatten()
        shift[index] = step
        shift = shift.view_as(x)
        with torch.no_grad():
            slope = (function(x + shift) - function(x - shift)) / (2 * step)
        assert found.flatten()[index] == pytest.approx(float(slope), abs=2e-3)


def test_soft_labels_spread_the_smoothing_over_all_classes() -> None:
    found = losses.soft_labels(torch.tensor([1]), 4, 0.2)
    assert found.tolist() == [pytest.approx([0.05, 0.85, 0.05, 0.05])]


def test_classification_is_cross_entropy() -> None:
    logits, labels = rand(5, 3).float(), torch.tensor([0, 2, 1, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert losses.classification(logits, losses.soft_labels(labels, 3, 0.1)) == pytest.approx(float(expected))


@pytest.mark.parametrize(("usage", "target"), [(0.7, 0.5), (0.2, 0.5)])
def test_usage_distances(usage: float, target: float) -> None:
    u = torch.tensor(usage, requires_grad=True)
    absolute, squared = losses.absolute_usage(u, target), losses.squared_usage(u, target)
    assert float(absolute.detach()) == pytest.approx(abs(usage - target))
    assert float(squared.detach()) == pytest.approx((usage - target) ** 2)
    assert float(torch.autograd.grad(absolute, u)[0]) == (1 if usage > target else -1)
    assert float(torch.autograd.grad(squared, u)[0]) == pytest.approx(2 * (usage - target))


def test_floor_counts_only_units_used_too_little() -> None:
    masks = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])]
    assert float(losses.floor(masks, 0.3)) == pytest.approx((0 + 0.3 + 0 + 0.3) / 4)


def test_entropy_is_largest_where_undecided() -> None:
    z = rand(3, 4)
    p = z.sigmoid()
    expected = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert float(losses.entropy([z])) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses.entropy([torch.zeros(1)])) == pytest.approx(0.693147, rel=1e-5)


def test_diversity_falls_when_decisions_depend_on_the_input() -> None:
    constant, varied = torch.full((4, 2), 50.0), torch.tensor([[50.0], [50.0], [-50.0], [-50.0]])
    assert float(losses.diversity([constant])) == pytest.approx(1)
    assert float(losses.diversity([varied])) == pytest.approx(0)


def test_logit_distillation_is_the_scaled_divergence() -> None:
    student, teacher, tau = rand(4, 3), rand(4, 3, seed=1), 2.0
    p, q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    expected = tau**2 * (p * (p / q).log()).sum(-1).mean()
    assert float(losses.logit_distillation(student, teacher, tau)) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses.logit_distillation(teacher, teacher, tau)) == pytest.approx(0, abs=1e-6)


def test_attention_distillation_looks_at_kept_heads_only() -> None:
    student, teacher = rand(2, 3, 5).float(), rand(2, 3, 5, seed=1).float()
    heads = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    distance = (student - teacher).abs().sum(-1)
    expected = (distance[0, 0] + distance[0, 2]) / 2
    assert float(losses.attention_distillation(student, teacher, heads)) == pytest.approx(float(expected), rel=1e-5)


def test_hidden_distillation_without_any_kept_sublayer_is_zero() -> None:
    student, teacher = rand(3, 6), rand(3, 6, seed=1)
    assert float(losses.hidden_distillation(student, teacher, torch.zeros(3))) == 0
    expected = float((student - teacher).square()[1].mean())
    assert float(losses.hidden_distillation(student, teacher, torch.tensor([0.0, 1.0, 0.0]))) == pytest.approx(expected)


HEADS = torch.tensor([[1.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: losses.classification(x, losses.soft_labels(torch.tensor([0, 2]), 4, 0.1)),
        lambda x: losses.squared_usage(x.sigmoid().mean(), 0.3),
        lambda x: losses.absolute_usage(x.sigmoid().mean(), 0.3),
        lambda x: losses.floor([x.sigmoid()], 0.6),
        lambda x: losses.diversity([x]),
        lambda x: losses.logit_distillation(x, rand(2, 4, seed=1).float(), 3.0),
        lambda x: losses.attention_distillation(x[:, None].repeat(1, 2, 1), rand(2, 2, 4, seed=1).float(), HEADS),
        lambda x: losses.hidden_distillation(x, rand(2, 4, seed=1).float(), torch.tensor([1.0, 0.0])),
    ],
)
def test_gradients_against_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    gradient_agrees(function, rand(2, 4))


def test_entropy_gradient_in_closed_form() -> None:
    """With p = sigmoid(z): d/dz = - z p (1 - p)."""
    z = rand(6).float().requires_grad_()
    (found,) = torch.autograd.grad(losses.entropy([z]), z)
    p = z.sigmoid()
    torch.testing.assert_close(found, (-z * p * (1 - p) / 6).detach())
