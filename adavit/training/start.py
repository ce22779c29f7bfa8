"""What a run starts from: fresh weights, or those of another checkpoint fitted to new shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.errors import AdaViTError, OptionError
from adavit.model import AdaViT
from adavit.model.resize import resize_positions
from adavit.training.errors import TrainingError
from adavit.training.mimetic import start_mimetic

__all__ = ["adaptive_shapes", "dense_shapes", "fit", "new_model"]

DEVIATION = 0.02
INITIAL_USAGE = 0.9
HEAD_WIDTH = 64
SMALLEST, LARGEST = 28, 224
"""Image sizes of a new model, where nothing sets one."""
PATCHES, MOST_PATCHES = (4, 8, 16), 256
"""Patch sides of a new model: the finest that gives no more than so many patches."""
POLICIES = {"tokens": "token_policy", "heads": "head_policy", "sublayers": "sublayer_policy"}


def new_model(arch: Architecture, seed: int, mimetic: bool = False) -> AdaViT:
    """A model with fresh weights: normal, truncated, of deviation 0.02; biases 0; decisions that mostly keep.

    Args:
        arch: its shapes.
        seed: of the weights.
        mimetic: attention and positions start as in `mimetic.start_mimetic`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AdaViT(arch)
        for name, parameter in model.named_parameters():
            if name.startswith("tokens_to_token.") and name.endswith(".w"):
                continue  # orthogonal random features
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=DEVIATION)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for block in model.blocks:
            _start_decisions(block)
        if mimetic:
            start_mimetic(model)
    return model


def _start_decisions(block: nn.Module) -> None:
    """Biases at which the noisy decisions keep 90 %; the Gumbel difference has a logistic distribution."""
    usual = log(INITIAL_USAGE / (1 - INITIAL_USAGE))
    for name, parameter in block.named_parameters():
        if name.endswith("mlp_head.bias"):
            nn.init.constant_(parameter, usual + (TOKEN_LOGIT if "token_select" in name else 0.0))


def dense_shapes(
    source: Architecture | None, given: Mapping[str, Any], classes: int, side: int = SMALLEST
) -> Architecture:
    """Shapes of a dense model: those given, else the source's, else those of a small model.

    Args:
        source: shapes of the weights to start from.
        given: shapes by name.
        classes: number of classes.
        side: of the pictures, in pixels, which the image size follows from 28 to 224 where nothing else sets it.

    Raises:
        OptionError: those given do not fit together.
        TrainingError: they do not fit the source.
    """
    if source is not None:
        usual = source.to_dict()
    else:
        stem, width = given.get("stem", "patch"), given.get("width", 192)
        sides = _usual_sides(given, side) if stem == "patch" else {"image_size": LARGEST, "patch_size": PATCHES[-1]}
        usual = {"stem": stem, "width": width, "depth": 8, "heads": max(1, width // HEAD_WIDTH), "hidden": 3 * width}
        usual |= {**sides, "qkv_bias": stem == "patch", "keep": 1}
    values = {**usual, **given, **dict.fromkeys(POLICIES.values(), False), "classes": classes}
    return _shapes(values, TrainingError if source else OptionError)


def _usual_sides(given: Mapping[str, Any], side: int) -> dict[str, int]:
    """Image size and patch side where they are not given: the pictures' size, in at most 256 patches if they can be."""
    size = given.get("image_size", min(max(side, SMALLEST), LARGEST))
    fitting = [patch for patch in PATCHES if "image_size" not in given or size % patch == 0] or [PATCHES[0]]
    patch = given.get("patch_size") or next((p for p in fitting if (size // p) ** 2 <= MOST_PATCHES), fitting[-1])
    return {"image_size": max(patch, size - size % patch), "patch_size": patch}


def adaptive_shapes(source: Architecture, kinds: Collection[str], classes: int, patch: int | None) -> Architecture:
    """Shapes of the source with the policies `kinds`, of `budget.KINDS`, and maybe another patch side."""
    policies = {name: kind in kinds for kind, name in POLICIES.items()}
    return _shapes({**source.to_dict(), **policies, "classes": classes, "patch_size": patch or source.patch_size})


def _shapes(values: dict[str, Any], fault: type[AdaViTError] = TrainingError) -> Architecture:
    try:
        return Architecture.from_dict(values)
    except ValueError as error:
        raise fault(f"no such model: {error}") from None


def fit(source: AdaViT, arch: Architecture, seed: int) -> AdaViT:
    """A model of shapes `arch` with the weights of `source`.

    The position embedding and the patch kernel are interpolated; of more blocks than are wanted, evenly spaced ones
    are taken, the first and the last among them; a head for another number of classes, and decision layers that the
    source lacks, start fresh.

    Raises:
        TrainingError: the backbones differ in more than that.
    """
    adaptable = {"image_size", "patch_size", "classes", "keep", *POLICIES.values()}
    if arch.depth < source.arch.depth:
        adaptable.add("depth")
    same = {name: getattr(source.arch, name) for name in adaptable}
    if replace(arch, **same) != source.arch:
        differing = [
            name for name, value in source.arch.to_dict().items() if getattr(replace(arch, **same), name) != value
        ]
        raise TrainingError(f"the weights to start from have another {', '.join(differing)}; leave that option out")
    model = new_model(arch, seed)
    old, new = _spaced_blocks(source.state_dict(), source.arch.depth, arch.depth), model.state_dict()
    for name, fresh in new.items():
        if name == "pos_embed":
            new[name] = resize_positions(old[name], arch.grid)
        elif name == "patch_embed.proj.weight":
            new[name] = _resize_kernel(old[name], arch.patch_size)
        elif name in old and old[name].shape == fresh.shape:
            new[name] = old[name]
    model.load_state_dict(new)
    return model


def _spaced_blocks(state: dict[str, Tensor], depth: int, wanted: int) -> dict[str, Tensor]:
    """The weights of as many blocks as wanted, renumbered."""
    places = {round(i * (depth - 1) / max(1, wanted - 1)): i for i in range(wanted)}
    found = {}
    for name, weight in state.items():
        group, _, rest = name.partition(".")
        block, _, inner = rest.partition(".")
        if group != "blocks":
            found[name] = weight
        elif int(block) in places:
            found[f"blocks.{places[int(block)]}.{inner}"] = weight
    return found


def _resize_kernel(kernel: Tensor, patch: int) -> Tensor:
    """Interpolates [D, 3, p, p] and keeps its sums, so that an even patch gives the same token."""
    if kernel.shape[-1] == patch:
        return kernel
    scaled = F.interpolate(kernel, (patch, patch), mode="bilinear", antialias=True, align_corners=False)
    scaled = scaled + (kernel.mean((2, 3), keepdim=True) - scaled.mean((2, 3), keepdim=True))
    return scaled * (kernel.shape[-1] / patch) ** 2
