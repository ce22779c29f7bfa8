"""Stems: pixels [B, 3, S, S] to patch tokens [B, P, D]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adavit.architecture import Architecture
from adavit.macs import PERFORMER_FEATURES, PERFORMER_WIDTH


class PatchEmbed(nn.Module):
    """The DeiT stem: one strided convolution."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, arch.width, arch.patch_size, arch.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Performer(nn.Module):
    """The T2T stem's attention with positive random features: [B, n, inputs] -> [B, n, 64].

    phi(u) = exp(u w^T - |u|^2 / 2) / sqrt(m); the skip around attention is the value.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        width = PERFORMER_WIDTH
        self.w = nn.Parameter(torch.empty(PERFORMER_FEATURES, width), requires_grad=False)
        nn.init.orthogonal_(self.w, gain=PERFORMER_FEATURES**0.5)
        self.kqv = nn.Linear(inputs, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(inputs, eps=1e-5)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def features(self, u: Tensor) -> Tensor:
        """phi(u): [B, n, 64] -> [B, n, 32]."""
        return torch.exp(u @ self.w.T - u.square().sum(-1, keepdim=True) / 2) / self.w.shape[0] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        key, query = self.features(key), self.features(query)
        numerator = query @ (key.transpose(1, 2) @ value)
        denominator = query @ key.sum(1, keepdim=True).transpose(1, 2)
        y = value + self.proj(numerator / (denominator + 1e-8))
        return y + self.mlp(self.norm2(y))


class TokensToToken(nn.Module):
    """The T2T stem: unfold, performer, fold to a map, twice; then unfold and project."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.attention1 = Performer(3 * 7 * 7)
        self.attention2 = Performer(PERFORMER_WIDTH * 3 * 3)
        self.project = nn.Linear(PERFORMER_WIDTH * 3 * 3, arch.width)

    @staticmethod
    def to_map(tokens: Tensor) -> Tensor:
        """[B, n, C] -> [B, C, sqrt(n), sqrt(n)]."""
        side = round(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def forward(self, images: Tensor) -> Tensor:
        x = F.unfold(images, 7, stride=4, padding=2).transpose(1, 2)
        x = F.unfold(self.to_map(self.attention1(x)), 3, stride=2, padding=1).transpose(1, 2)
        x = F.unfold(self.to_map(self.attention2(x)), 3, stride=2, padding=1).transpose(1, 2)
        return self.project(x)
