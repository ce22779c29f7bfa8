"""The policy equations of AdaViT, to be read beside section 3 of the paper (arXiv 2111.15668).

Every decision of a block is a linear function of the block's *input* x [B, N, D]:

    heads      m_h = 1[ W_h x_cls + b_h > 0 ]                       [B, H]
    sub-layers m_l = 1[ W_l x_cls + b_l > 0 ]                       [B, 2]    attention, MLP
    tokens     m_t = 1[ sigmoid(W_t norm1(x_patches) + b_t) > 0.6 ] [B, P]    the class token always stays

and a mask changes the block like this, T the kept tokens, S the kept heads:

    attention  x_T += proj( concat_{j in S} softmax(q_j k_j^T / sqrt(d)) v_j )   over T only
    MLP        x_T += fc2( gelu( fc1( norm2(x)_T restricted to the channels of S ) ) )

Comparisons are strict. Masks are floats of 0 and 1, so that training can send gradients through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adavit.architecture import TOKEN_THRESHOLD

HEAD_THRESHOLD = SUBLAYER_THRESHOLD = 0.5


@dataclass
class BlockPolicy:
    """One block's masks, each None where nothing of that kind is ever dropped.

    Attributes:
        tokens: [B, N], class token first; heads: [B, H]; sublayers: [B, 2], attention then MLP.
    """

    tokens: Tensor | None
    heads: Tensor | None
    sublayers: Tensor | None


class Decide(Protocol):
    """Turns decision logits into a mask of 0 and 1; training passes its own, with gradients."""

    def __call__(self, logits: Tensor, threshold: float) -> Tensor: ...


def decide(logits: Tensor, threshold: float) -> Tensor:
    """The decision at inference: 1 where sigmoid(logits) > threshold, strictly."""
    return (logits > 0 if threshold == 0.5 else logits.sigmoid() > threshold).to(logits.dtype)


def with_class_token(patches: Tensor) -> Tensor:
    """Puts the class token, always kept, before the patch mask: [B, P] -> [B, 1 + P]."""
    return torch.cat([torch.ones_like(patches[:, :1]), patches], dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor, policy: BlockPolicy) -> Tensor:
    """Softmax attention over the kept tokens, then the kept heads: each [B, H, N, d] -> [B, H, N, d].

    The token mask acts before the softmax and sends no gradient, as published.
    """
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if policy.tokens is not None:
        dropped = policy.tokens.detach()[:, None, None, :] == 0
        scores = scores.masked_fill(dropped, float("-inf"))
    out = scores.softmax(dim=-1) @ value
    return out if policy.heads is None else out * policy.heads[:, :, None, None]


def narrow(channels: Tensor, policy: BlockPolicy) -> Tensor:
    """The head policy's effect on the MLP's input: [B, N, D] with the channels of dropped heads at 0."""
    if policy.heads is None:
        return channels
    mask = policy.heads.repeat_interleave(channels.shape[-1] // policy.heads.shape[1], dim=1)
    return channels * mask[:, None, :]


def residual(x: Tensor, update: Tensor, policy: BlockPolicy, sublayer: int) -> Tensor:
    """Adds a sub-layer's update [B, N, D] at the kept tokens of the samples that keep the sub-layer."""
    if policy.tokens is not None:
        update = update * policy.tokens[:, :, None]
    if policy.sublayers is not None:
        update = update * policy.sublayers[:, sublayer, None, None]
    return x + update


__all__ = [
    "HEAD_THRESHOLD",
    "SUBLAYER_THRESHOLD",
    "TOKEN_THRESHOLD",
    "BlockPolicy",
    "Decide",
    "attend",
    "decide",
    "narrow",
    "residual",
    "with_class_token",
]
