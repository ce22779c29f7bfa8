"""The whole training loss: classification, usage and distillation, term by term."""

from __future__ import annotations

from torch import Tensor

from adavit.model.adavit import BlockLogits, Output
from adavit.model.policy import BlockPolicy
from adavit.training import losses
from adavit.training.recorder import Recording
from adavit.training.settings import PolicySettings, Settings
from adavit.training.usage import Usage

__all__ = ["distillation_terms", "usage_terms"]

Terms = dict[str, Tensor]


def usage_terms(output: Output, usage: Usage, settings: PolicySettings) -> Terms:
    """Usage losses, floors, entropy and diversity, each times its weight; terms of weight 0 are left out."""
    terms: Terms = {}
    for kind, mean in usage.items():
        distance = losses.squared_usage if kind == "tokens" else losses.absolute_usage
        terms[f"usage_{kind}"] = settings.weights[kind] * distance(mean, settings.targets[kind])
    if settings.floor_weight > 0 and (masks := _unit_masks(output.policies)):
        terms["floor"] = settings.floor_weight * losses.floor(masks, settings.floor)
    if settings.entropy_weight > 0:
        terms["entropy"] = settings.entropy_weight * losses.entropy(_all_logits(output.decisions))
    if settings.diversity_weight > 0:
        terms["diversity"] = settings.diversity_weight * losses.diversity(_all_logits(output.decisions))
    return terms


def distillation_terms(
    student: Output, teacher: Output, recordings: tuple[Recording, Recording] | None, heads: int, settings: Settings
) -> Terms:
    """Soft labels, class-token attention of the kept heads, class-token states of the kept sub-layers.

    Args:
        student: its output.
        teacher: its output for the same images.
        recordings: recordings of both forwards, where more than logits is compared.
        heads: of every block.
        settings: the weights.
    """
    terms: Terms = {}
    if settings.logit_weight > 0:
        loss = losses.logit_distillation(student.logits, teacher.logits, settings.distillation_temperature)
        terms["distil_logits"] = settings.logit_weight * loss
    policy, blocks = settings.policy, range(len(student.policies))
    if recordings is None or policy is None:
        return terms
    if policy.attention_weight > 0:
        per_block = [
            losses.attention_distillation(
                recordings[0].attention(i, heads, student.policies[i]),
                recordings[1].attention(i, heads),
                student.policies[i].heads,
            )
            for i in blocks
        ]
        terms["distil_attention"] = policy.attention_weight * _mean(per_block)
    if policy.hidden_weight > 0:
        per_sublayer = [
            losses.hidden_distillation(
                recordings[0].states[2 * i + s], recordings[1].states[2 * i + s], _kept(student.policies[i], s)
            )
            for i in blocks
            for s in (0, 1)
        ]
        terms["distil_hidden"] = policy.hidden_weight * _mean(per_sublayer)
    return terms


def _kept(policy: BlockPolicy, sublayer: int) -> Tensor | None:
    return None if policy.sublayers is None else policy.sublayers[:, sublayer]


def _unit_masks(policies: list[BlockPolicy]) -> list[Tensor]:
    return [mask for p in policies for mask in (p.heads, p.sublayers) if mask is not None]


def _all_logits(decisions: list[BlockLogits]) -> list[Tensor]:
    return [z for d in decisions for z in (d.tokens, d.heads, d.sublayers) if z is not None]


def _mean(terms: list[Tensor]) -> Tensor:
    return sum(terms[1:], start=terms[0]) / len(terms)
