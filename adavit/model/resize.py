"""The same model for another image size."""

from __future__ import annotations

from dataclasses import replace

import torch
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
    first, patches = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    grid = patches.transpose(1, 2).unflatten(2, (arch.grid, arch.grid))
    grid = F.interpolate(grid, size=(wanted.grid, wanted.grid), mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)
    with torch.device("meta"):
        resized = AdaViT(wanted)
    resized.load_state_dict(state, assign=True)
    return resized.eval()
