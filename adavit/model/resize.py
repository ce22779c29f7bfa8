"""The same model for another image size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from adavit.errors import CheckpointError
from adavit.model.adavit import AdaViT


def resize(model: AdaViT, image_size: int) -> AdaViT:
    """The model for square images of `image_size` pixels, its position embedding interpolated (bicubic).

    Raises:
        CheckpointError: the size is not a positive multiple of the patch size.
    """
    arch = model.arch
    if image_size == arch.image_size:
        return model
    try:
        wanted = replace(arch, image_size=image_size)
    except ValueError as error:
        raise CheckpointError(f"image size {image_size} cannot be had: {error}") from None
    state = dict(model.state_dict())
    state["pos_embed"] = resize_positions(state["pos_embed"], wanted.grid)
    with torch.device("meta"):
        resized = AdaViT(wanted)
    resized.load_state_dict(state, assign=True)
    return resized.eval()


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embedding [1, 1 + P, D] for a map of grid x grid patches (bicubic); the class token's is kept."""
    first, patches = positions[:, :1], positions[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return positions
    found = patches.transpose(1, 2).unflatten(2, (side, side))
    found = F.interpolate(found, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, found.flatten(2).transpose(1, 2)], dim=1)
