"""A start from which little data suffices: attention that looks at what it sits on (Trockman, Kolter, ICML 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adavit.model import AdaViT
from adavit.model.adavit import Attention

__all__ = ["start_mimetic"]

LOOK, CARRY = 0.7, 0.4  # weights of the identity and of the noise, as published
POSITION_SCALE = 0.5
LONGEST = 10_000.0


@torch.no_grad()
def start_mimetic(model: AdaViT) -> None:
    """Overwrites the attention of fresh weights, the position embedding and, for a patch stem, its kernel.

    Per head, Wq' Wk is close to 0.7 (I + Z), and Wproj Wv close to 0.4 (Z - I), with Z normal of variance 1 / D; the
    position embedding is of sines and cosines (arXiv 2305.09828).
    """
    arch = model.arch
    for attention in (layer for layer in model.modules() if isinstance(layer, Attention)):
        queries, keys = (layer.weight.chunk(arch.heads) for layer in (attention.query, attention.key))
        for query, key in zip(queries, keys, strict=True):
            left, right = _factors(LOOK * (_noise(arch.width) + torch.eye(arch.width)), len(query))
            query.copy_(left.T)
            key.copy_(right)
        left, right = _factors(CARRY * (_noise(arch.width) - torch.eye(arch.width)), arch.width)
        attention.proj.weight.copy_(left)
        attention.value.weight.copy_(right)
    model.pos_embed[0, 1:].copy_(POSITION_SCALE * _sinusoids(arch.grid, arch.width))
    if arch.stem == "patch":
        kernel = model.get_parameter("patch_embed.proj.weight")
        nn.init.normal_(kernel, std=kernel[0].numel() ** -0.5)


def _noise(width: int) -> Tensor:
    return torch.randn(width, width) * width**-0.5


def _factors(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Matrices [D, r] and [r, D] whose product is the best approximation of [D, D] of that rank."""
    u, s, vh = torch.linalg.svd(product)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _sinusoids(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column of grid x grid places [P, D]; left over channels are 0."""
    waves = width // 4
    places = torch.arange(grid) * (LONGEST ** (-torch.arange(waves) / waves))[:, None]  # [waves, G]
    row, column = places[:, :, None].expand(-1, -1, grid), places[:, None, :].expand(-1, grid, -1)
    found = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()]).flatten(1).T
    return torch.cat([found, torch.zeros(grid * grid, width - 4 * waves)], dim=1)
