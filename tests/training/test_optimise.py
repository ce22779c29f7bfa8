import pytest
import torch
from training_cases import tiny

from adavit.training import start
from adavit.training.optimise import build_optimiser, learning_rate, set_learning_rate, update_average
from adavit.training.settings import PolicySettings, Settings


def test_warm_up_then_half_a_cosine() -> None:
    settings = Settings(steps=110, batch=1, learning_rate=1.0, warmup=10, final=0.1)
    assert [learning_rate(step, settings) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert learning_rate(60, settings) == pytest.approx(0.55)
    assert learning_rate(110, settings) == pytest.approx(0.1)


def test_decision_layers_have_their_own_rate_and_vectors_no_decay() -> None:
    model = start.new_model(tiny(), 0)
    settings = Settings(steps=1, batch=1, policy=PolicySettings(learning_rate_scale=4))
    optimiser = build_optimiser(model, settings)
    set_learning_rate(optimiser, 0.5)
    found = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    groups = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    assert groups["blocks.1.head_select.mlp_head.weight"]["lr"] == 2.0
    assert groups["blocks.1.mlp.fc1.weight"]["lr"] == 0.5
    assert groups["blocks.1.mlp.fc1.weight"]["weight_decay"] == 0.05
    assert groups["pos_embed"]["weight_decay"] == groups["norm.bias"]["weight_decay"] == 0


def test_the_average_follows_quickly_at_first_and_slowly_later() -> None:
    model = start.new_model(tiny(), 0)
    for step, decay in ((0, 0.1), (100_000, 0.99)):
        average = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
        update_average(average, model, step, 0.99)
        torch.testing.assert_close(average["cls_token"], (1 - decay) * model.cls_token.detach())
