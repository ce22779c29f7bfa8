"""From a share of the dense MACs to targets of usage, by the cost model."""

from __future__ import annotations

from collections.abc import Mapping

from adavit.architecture import Architecture
from adavit.errors import OptionError
from adavit.macs import block_macs, dense_macs, outside_macs
from adavit.training.errors import TrainingError

__all__ = ["KINDS", "expected_share", "targets_for"]

KINDS = ("tokens", "heads", "sublayers")
BISECTIONS = 50


def expected_share(arch: Architecture, usage: Mapping[str, float]) -> float:
    """Share of the dense MACs at mean usages, each unit being used independently of the others.

    A kind that is not given is used fully. The cost model counts whole tokens and heads; between two counts
    it is interpolated.
    """
    tokens = 1 + usage.get("tokens", 1.0) * arch.patches
    heads = usage.get("heads", 1.0) * arch.heads
    kept = arch.keep * _between(arch, tokens, arch.heads)
    adapted = (arch.depth - arch.keep) * _between(arch, tokens, heads) * usage.get("sublayers", 1.0)
    return (outside_macs(arch) + kept + adapted) / dense_macs(arch)


def _between(arch: Architecture, tokens: float, heads: float) -> float:
    """MACs of a block at fractional counts, bilinear between the whole ones."""
    low_tokens, low_heads = int(tokens), int(heads)
    t, h = tokens - low_tokens, heads - low_heads
    corners = (((1 - t) * (1 - h), 0, 0), ((1 - t) * h, 0, 1), (t * (1 - h), 1, 0), (t * h, 1, 1))
    return sum(weight * int(block_macs(arch, low_tokens + i, low_heads + j, 1, 1)) for weight, i, j in corners)


def targets_for(
    arch: Architecture, policies: tuple[str, ...], budget: float, chosen: Mapping[str, float]
) -> dict[str, float]:
    """Targets that meet a budget: those already chosen, and one value in common for the other kinds.

    Args:
        arch: the model's shapes.
        policies: the kinds that are trained, of `KINDS`.
        budget: share of the dense MACs.
        chosen: targets already chosen.

    Raises:
        OptionError: nothing is left to choose.
        TrainingError: no value in [0, 1] meets the budget.
    """
    free = [kind for kind in policies if kind not in chosen]

    def share(value: float) -> float:
        return expected_share(arch, {**chosen, **dict.fromkeys(free, value)})

    low, high = share(0.0), share(1.0)
    if not free:
        raise OptionError("every target is fixed: leave one out for --budget to choose, or leave --budget out")
    if not low <= budget <= high:
        raise TrainingError(
            f"a budget of {budget:.2f} is out of reach: {', '.join(free)} can set the MACs from {low:.2f} to "
            f"{high:.2f} of dense here; change --budget, --policies or a fixed target"
        )
    bottom, top = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if share(middle) < budget else (bottom, middle)
    return {**{kind: chosen[kind] for kind in policies if kind in chosen}, **dict.fromkeys(free, (bottom + top) / 2)}
