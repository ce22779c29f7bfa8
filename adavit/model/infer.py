"""Infers the architecture of a checkpoint from the names and shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from adavit.architecture import Architecture
from adavit.errors import CheckpointError, shown

T2T_PATCH = 16
USUAL_HEAD_WIDTH = 64


def infer_architecture(state: Mapping[str, Tensor], heads: int | None = None) -> Architecture:
    """The architecture that `state`, by released names, describes.

    Args:
        state: the weights.
        heads: attention heads where no head policy tells them.

    Raises:
        CheckpointError: the names are not an AdaViT's, or the shapes contradict each other.
    """

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in state:
            raise CheckpointError(f"missing {key}; this is not an AdaViT or ViT checkpoint, or part of one is lost")
        found = tuple(state[key].shape)
        if len(found) != dims:
            raise CheckpointError(f"mis-shaped {key} {list(found)}: expected {dims} dimensions")
        return found

    _, tokens, width = shape("pos_embed", 3)
    side = isqrt(tokens - 1) if tokens > 1 else 0
    if side < 1 or side * side != tokens - 1:
        raise CheckpointError(f"pos_embed has {tokens} tokens: expected a class token and a square of patches")
    stem = "t2t" if any(key.startswith("tokens_to_token.") for key in state) else "patch"
    patch = T2T_PATCH if stem == "t2t" else shape("patch_embed.proj.weight", 4)[-1]
    indices = [int(found[1]) for key in state if (found := re.match(r"blocks\.(\d{1,6})\.", key))]
    if not indices:
        raise CheckpointError("missing blocks.0.*; this is not an AdaViT or ViT checkpoint")
    depth = max(indices) + 1
    if absent := sorted(set(range(depth)) - set(indices)):
        raise CheckpointError(f"missing blocks.{absent[0]}.*: {depth} blocks are numbered, but that one is not there")

    head_blocks = _blocks_with(state, "head_select")
    sublayer_blocks = _blocks_with(state, "layer_select")
    token_blocks = _blocks_with(state, "attn.token_select")
    keep = _keep(depth, head_blocks, sublayer_blocks)
    _require_all("attn.token_select", token_blocks, range(depth))
    _require_all("head_select", head_blocks, range(keep, depth))
    _require_all("layer_select", sublayer_blocks, range(keep, depth))

    if head_blocks:
        counted = shape(f"blocks.{head_blocks[0]}.head_select.mlp_head.weight", 2)[0]
        if heads is not None and heads != counted:
            raise CheckpointError(f"{shown(heads)} heads asked for, but head_select decides on {counted}")
        heads = counted
    elif heads is None:
        if width % USUAL_HEAD_WIDTH:
            raise CheckpointError(
                f"nothing tells the number of heads (no head policy, width {width} not a multiple of 64); give `heads`"
            )
        heads = width // USUAL_HEAD_WIDTH
    try:
        return Architecture(
            stem=stem,
            image_size=side * patch,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            hidden=shape("blocks.0.mlp.fc1.weight", 2)[0],
            classes=shape("head.weight", 2)[0],
            keep=keep,
            qkv_bias=any(re.search(r"\.attn\.(query|key|value)\.bias$", key) for key in state),
            token_policy=bool(token_blocks),
            head_policy=bool(head_blocks),
            sublayer_policy=bool(sublayer_blocks),
        )
    except ValueError as error:
        raise CheckpointError(f"shapes do not fit together: {error}") from None


def _blocks_with(state: Mapping[str, Tensor], part: str) -> list[int]:
    pattern = re.compile(rf"blocks\.(\d{{1,6}})\.{re.escape(part)}\.mlp_head\.")
    return sorted({int(found[1]) for key in state if (found := pattern.match(key))})


def _keep(depth: int, head_blocks: list[int], sublayer_blocks: list[int]) -> int:
    """Leading blocks that no head or sub-layer policy adapts; 1, as published, where there is no such policy."""
    first = [blocks[0] for blocks in (head_blocks, sublayer_blocks) if blocks]
    return min(first) if first else min(1, depth)


def _require_all(part: str, present: list[int], wanted: range) -> None:
    if present and (absent := sorted(set(wanted) - set(present))):
        where = ", ".join(str(block) for block in absent)
        raise CheckpointError(f"missing {part} in block {where}, though other blocks have it; a policy is all or none")
