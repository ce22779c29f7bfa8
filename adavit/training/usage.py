"""Usage of tokens, heads and sub-layers: the means that the usage losses pull to their targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adavit.model.policy import BlockPolicy
from adavit.training.distributed import global_mean

__all__ = ["Usage", "measure_usage"]


@dataclass(frozen=True)
class Usage:
    """Mean usages over a global batch, with gradient; None where there is no policy of that kind.

    Attributes:
        tokens: over patch tokens of every block.
        heads: over the sub-layers that run.
        sublayers: over attention and MLP of the adapted blocks.
    """

    tokens: Tensor | None
    heads: Tensor | None
    sublayers: Tensor | None

    def items(self) -> list[tuple[str, Tensor]]:
        """(kind, mean) of the kinds there are."""
        named = (("tokens", self.tokens), ("heads", self.heads), ("sublayers", self.sublayers))
        return [(kind, mean) for kind, mean in named if mean is not None]


def measure_usage(policies: list[BlockPolicy]) -> Usage:
    """Means of the masks of a forward.

        tokens     mean over samples, blocks and patches of m_t
        heads      sum_{l, s} m_l(l, s) * mean_j m_h(l, j)  /  sum_{l, s} m_l(l, s),   s: attention, MLP
        sub-layers mean over samples, adapted blocks and s of m_l

    In the heads' mean the sub-layer masks are weights without gradient: a head must not be saved by
    skipping the layer.
    """
    tokens = [p.tokens[:, 1:] for p in policies if p.tokens is not None]
    heads = [p.heads.mean(1) for p in policies if p.heads is not None]
    sublayers = [p.sublayers for p in policies if p.sublayers is not None]
    running = [
        torch.full_like(p.heads[:, 0], 2) if p.sublayers is None else p.sublayers.sum(1).detach()
        for p in policies
        if p.heads is not None
    ]
    return Usage(
        global_mean(torch.stack(tokens).mean()) if tokens else None,
        _weighted(torch.stack(heads), torch.stack(running)) if heads else None,
        global_mean(torch.stack(sublayers).mean()) if sublayers else None,
    )


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    total = global_mean(weights.mean())
    return global_mean((values * weights).mean()) / total.clamp(min=torch.finfo(total.dtype).tiny)
