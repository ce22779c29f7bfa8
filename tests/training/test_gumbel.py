import pytest
import torch
from training_cases import tiny

from adavit.model import AdaViT
from adavit.model import policy as P
from adavit.training.distributed import World
from adavit.training.gumbel import GumbelDecide, noise_scale, straight_through
from adavit.training.start import new_model

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("threshold", [0.5, 0.6])
def test_forward_is_the_hard_decision(threshold: float) -> None:
    z = torch.tensor([-1.0, 0.0, 0.2, 0.5, 3.0])
    found = straight_through(z, 0.0, threshold, 5.0)
    assert torch.equal(found, P.decide(z, threshold))
    assert set(found.tolist()) <= {0.0, 1.0}


def test_backward_is_the_gradient_of_the_smooth_decision() -> None:
    z, noise, tau = torch.randn(20).requires_grad_(), torch.randn(20), 5.0
    (found,) = torch.autograd.grad(straight_through(z, noise, 0.6, tau).sum(), z)
    p = ((z + noise) / tau).sigmoid()
    torch.testing.assert_close(found, (p * (1 - p) / tau).detach())


def test_noise_keeps_a_unit_as_often_as_its_sigmoid_says() -> None:
    z = torch.tensor([-1.0, 0.0, 2.0]).repeat(20000, 1)
    kept = GumbelDecide(5.0, 1.0, 0, ALONE)(z, 0.5).mean(0)
    torch.testing.assert_close(kept, z[0].sigmoid(), atol=0.015, rtol=0)


def test_noise_is_the_same_for_any_number_of_processes() -> None:
    z = torch.zeros(4, 6)
    whole = GumbelDecide(5.0, 1.0, 3, ALONE)(z, 0.5)
    halves = [GumbelDecide(5.0, 1.0, 3, World(rank, 2, ALONE.device))(z[:2], 0.5) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, GumbelDecide(5.0, 1.0, 4, ALONE)(z, 0.5))


def test_noise_scale_falls_to_zero_and_stays() -> None:
    assert [noise_scale(s, 100, 0.5) for s in (0, 25, 50, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert noise_scale(99, 100, 0.0) == 1.0


def test_training_forward_without_noise_decides_as_inference_does() -> None:
    model = randomised()
    images = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        oracle, trained = model(images), model(images, decide=GumbelDecide(5.0, 0.0, 0, ALONE))
    masks = oracle.stacked(model.arch)
    for found, expected in zip(trained.stacked(model.arch), masks, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(trained.logits, oracle.logits)
    assert all(0 < mask.float().mean() < 1 for mask in masks)  # else the comparison shows nothing


def randomised() -> AdaViT:
    model = new_model(tiny(), 0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp_head" in name:
                parameter.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(len(name)))
            elif parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return model
