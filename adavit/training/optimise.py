"""Learning-rate schedule, parameter groups, and the moving average of the weights."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from adavit.model.adavit import AdaViT
from adavit.training.settings import Settings

__all__ = ["build_optimiser", "learning_rate", "restore_moments", "set_learning_rate", "update_average"]

UNDECAYED = ("cls_token", "pos_embed")
DECISION_LAYER = ".mlp_head."


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up to the base rate, then half a cosine down to `final` times it."""
    base, warmup = settings.learning_rate, settings.warmup
    if step < warmup:
        return base * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return base * (settings.final + (1 - settings.final) * (1 + cos(pi * progress)) / 2)


def build_optimiser(model: AdaViT, settings: Settings) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, and the decision layers' own rate."""
    scale = settings.policy.learning_rate_scale if settings.policy else 1.0
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 and name not in UNDECAYED else 0.0
            groups.setdefault((decay, scale if DECISION_LAYER in name else 1.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay, "scale": scale} for (decay, scale), group in groups.items()],
        lr=settings.learning_rate,
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group, times the group's scale."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]


def restore_moments(optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Goes on with the moments of a saved state; rates and decay stay as they are.

    Raises:
        ValueError: they are of other parameters.
    """
    own = optimiser.state_dict()
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own["param_groups"]]:
        raise ValueError("the optimiser is of other parameters")
    optimiser.load_state_dict({**own, "state": saved["state"]})
    for parameter, moments in optimiser.state.items():
        wanted = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if {name: value.shape for name, value in moments.items()} != wanted:
            raise ValueError("the optimiser is of parameters of other shapes")


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: AdaViT, step: int, decay: float) -> None:
    """Moves a to d a + (1 - d) w in place, with d = min(decay, (1 + step) / (10 + step)), small at the start."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, weight in model.state_dict().items():
        average[name].lerp_(weight, 1 - decay)
