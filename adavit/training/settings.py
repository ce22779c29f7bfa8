"""Everything about a run that changes its result; a resumed run must have the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adavit.errors import shown
from adavit.training.budget import KINDS

__all__ = ["PolicySettings", "Settings", "describe_change"]

PUBLISHED_TARGET = 0.5


@dataclass(frozen=True)
class PolicySettings:
    """How the policies are learned, in the notation of `losses.py`.

    Attributes:
        targets: gamma by kind; the kinds it names are trained.
        weights: lambda by kind.
        temperature: tau of the Gumbel-sigmoid's gradient.
        anneal: fraction of the run after which decisions are without noise, as at inference; 0 never.
        floor: least usage of every head and sub-layer, weighted by floor_weight.
        entropy_weight, diversity_weight: of those terms.
        attention_weight, hidden_weight: of distillation from the inside of a dense teacher.
        learning_rate_scale: of the decision layers, relative to the rest.
    """

    targets: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, PUBLISHED_TARGET))
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 2.0))
    temperature: float = 5.0
    anneal: float = 0.3
    floor: float = 0.0
    floor_weight: float = 0.0
    entropy_weight: float = 0.0
    diversity_weight: float = 0.0
    attention_weight: float = 0.0
    hidden_weight: float = 0.0
    learning_rate_scale: float = 10.0

    @property
    def distils_features(self) -> bool:
        """Whether it learns from the inside of a teacher, not from its logits alone."""
        return max(self.attention_weight, self.hidden_weight) > 0

    @property
    def weighted_targets(self) -> dict[str, float]:
        """The targets of the kinds whose usage has a weight."""
        return {kind: target for kind, target in self.targets.items() if self.weights[kind] > 0}


@dataclass(frozen=True)
class Settings:
    """A run.

    Attributes:
        steps: optimiser steps; batch: images of one, over all processes; seed: of everything random.
        learning_rate: after `warmup` steps, from where it follows a cosine to `final` times itself.
        weight_decay: of matrices; clip: bound on the gradient's norm.
        smoothing: of labels; mixup: alpha of the Beta distribution, 0 for none.
        ema: decay of the weights' moving average; precision: "fp32" or "bf16" (autocast).
        compile: whether the model is compiled, which rounds otherwise.
        augment, mirror, crop: see `augment.Augment`.
        token_drop: share of the patch tokens that every step leaves out, at random.
        logit_weight: of the teacher's soft labels, of temperature `distillation_temperature`; 0 without a teacher.
        policy: None for a dense model.
    """

    steps: int
    batch: int
    seed: int = 0
    learning_rate: float = 1e-3
    warmup: int = 0
    final: float = 0.01
    weight_decay: float = 0.05
    clip: float = 1.0
    smoothing: float = 0.1
    mixup: float = 0.0
    ema: float = 0.999
    precision: str = "fp32"
    compile: bool = False
    augment: str = "shift"
    mirror: bool = True
    crop: float = 1.0
    token_drop: float = 0.0
    logit_weight: float = 0.0
    distillation_temperature: float = 1.0
    policy: PolicySettings | None = None

    @property
    def distils(self) -> bool:
        """Whether there is anything to learn from a teacher."""
        return self.logit_weight > 0 or (self.policy is not None and self.policy.distils_features)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def describe_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first entry in which a resumed run would differ, in words, or None."""
    for name in sorted({*before, *after}, key=str):
        old, new = before.get(name), after.get(name)
        if old != new:
            inside = describe_change(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else None
            return f"{name}: {inside}" if inside else f"{name} was {shown(old)}, now {shown(new)}"
    return None
