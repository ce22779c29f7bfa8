"""The terms of the training loss, one small function each; `objective.py` adds them up.

Means over the batch are means over the global batch: see `distributed.global_mean`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from adavit.training.distributed import global_mean

__all__ = [
    "absolute_usage",
    "attention_distillation",
    "classification",
    "diversity",
    "entropy",
    "floor",
    "hidden_distillation",
    "logit_distillation",
    "soft_labels",
    "squared_usage",
]


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets (1 - s) * onehot + s / C: int [B] to [B, C]."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def classification(logits: Tensor, targets: Tensor) -> Tensor:
    """- mean_b sum_c y_bc log softmax(z_b)_c, for logits and soft labels [B, C]."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()


def absolute_usage(usage: Tensor, target: float) -> Tensor:
    """| u - gamma |: of heads and of sub-layers."""
    return (usage - target).abs()


def squared_usage(usage: Tensor, target: float) -> Tensor:
    """( u - gamma )^2: of tokens."""
    return (usage - target).square()


def floor(masks: Sequence[Tensor], least: float) -> Tensor:
    """mean_k max(0, least - mean_b m_bk): no unit k of any block (masks [B, K]) is used less than `least`."""
    return torch.cat([F.relu(least - global_mean(mask.mean(0))) for mask in masks]).mean()


def entropy(logits: Sequence[Tensor]) -> Tensor:
    """Mean of - p log p - (1 - p) log(1 - p), p = sigmoid(z): small where decisions are sure, far from a threshold."""
    z = torch.cat([each.float().flatten() for each in logits])
    return F.binary_cross_entropy_with_logits(z, z.sigmoid())


def diversity(logits: Sequence[Tensor]) -> Tensor:
    """1 - 4 mean_k var_b sigmoid(z_bk), logits [B, K]: 0 where every unit is on for half of the inputs, 1 for none."""
    p = torch.cat([each.float().sigmoid() for each in logits], dim=1)
    variance = global_mean(p.square().mean(0)) - global_mean(p.mean(0)).square()
    return 1 - 4 * variance.mean()


def logit_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 KL( softmax(teacher / tau) || softmax(student / tau) ), logits [B, C]."""
    log_s, log_t = ((z.float() / temperature).log_softmax(-1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def attention_distillation(student: Tensor, teacher: Tensor, heads: Tensor | None) -> Tensor:
    """Mean over kept heads of sum_n | a_s - a_t |, class-token attention [B, H, N] of one block, mask [B, H]."""
    distance = (student - teacher).abs().sum(-1)
    return _masked_mean(distance, heads)


def hidden_distillation(student: Tensor, teacher: Tensor, kept: Tensor | None) -> Tensor:
    """Mean over samples that keep the sub-layer of mean_d ( c_s - c_t )^2, class tokens [B, D], mask [B]."""
    distance = (student.float() - teacher.float()).square().mean(-1)
    return _masked_mean(distance, kept)


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean where the mask is 1; the mask selects and gets no gradient."""
    if mask is None:
        return values.mean()
    weights = mask.detach()
    share = global_mean(weights.mean())
    return (values * weights).mean() / share.clamp(min=1 / weights.numel())
