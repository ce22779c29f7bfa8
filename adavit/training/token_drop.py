"""Training on some of an image's patches (PatchDropout, Liu et al., WACV 2023): cheaper steps, sturdier features."""

from __future__ import annotations

import torch
from torch import Tensor

from adavit.training.distributed import World

__all__ = ["choose_tokens"]


def choose_tokens(patches: int, drop: float, batch: int, seed: int, world: World) -> Tensor | None:
    """The patch tokens that each image of this process's batch keeps, a function of the seed alone.

    Args:
        patches: patch tokens of an image.
        drop: share of them to leave out; at least one stays.
        batch: this process's images.
        seed: of this step.
        world: every process draws for the global batch and takes its part.

    Returns:
        int64 [batch, kept], ascending; None where all are kept.
    """
    if drop == 0:
        return None
    kept = max(1, round(patches * (1 - drop)))
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch * world.size, patches, generator=generator).argsort(dim=1)
    return order[world.share(len(order)), :kept].sort(dim=1).values
