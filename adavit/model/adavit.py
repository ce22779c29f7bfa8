"""AdaViT in PyTorch: the masked forward that everything else is checked against, and its dense twin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adavit.architecture import Architecture
from adavit.model import policy as P
from adavit.model.stem import PatchEmbed, TokensToToken


class Select(nn.Module):
    """A decision head: one linear layer to one logit per thing that can be dropped."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.mlp_head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_head(x)


class Attention(nn.Module):
    """Multi-head attention under a policy; holds the block's token-selection head, as released."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.heads = arch.heads
        self.query = nn.Linear(arch.width, arch.width, bias=arch.qkv_bias)
        self.key = nn.Linear(arch.width, arch.width, bias=arch.qkv_bias)
        self.value = nn.Linear(arch.width, arch.width, bias=arch.qkv_bias)
        self.proj = nn.Linear(arch.width, arch.width)
        if arch.token_policy:
            self.token_select = Select(arch.width, 1)

    def forward(self, normed: Tensor, policy: P.BlockPolicy) -> Tensor:
        def split(u: Tensor) -> Tensor:
            return u.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        out = P.attend(split(self.query(normed)), split(self.key(normed)), split(self.value(normed)), policy)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The block's MLP; the head policy narrows its input."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.fc1 = nn.Linear(arch.width, arch.hidden)
        self.fc2 = nn.Linear(arch.hidden, arch.width)

    def forward(self, normed: Tensor, policy: P.BlockPolicy) -> Tensor:
        return self.fc2(F.gelu(self.fc1(P.narrow(normed, policy))))


@dataclass
class BlockLogits:
    """One block's decision logits, None where it has no policy of that kind."""

    tokens: Tensor | None  # [B, P]
    heads: Tensor | None  # [B, H]
    sublayers: Tensor | None  # [B, 2]


class Block(nn.Module):
    """One transformer block with its decisions."""

    def __init__(self, arch: Architecture, index: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.width, eps=arch.norm_epsilon)
        self.attn = Attention(arch)
        self.norm2 = nn.LayerNorm(arch.width, eps=arch.norm_epsilon)
        self.mlp = Mlp(arch)
        if arch.adapts_heads(index):
            self.head_select = Select(arch.width, arch.heads)
        if arch.adapts_sublayers(index):
            self.layer_select = Select(arch.width, 2)

    def decision_logits(self, x: Tensor, normed: Tensor) -> BlockLogits:
        """Logits of every decision, from the block's input x and norm1(x), both [B, N, D]."""
        return BlockLogits(
            self.attn.token_select(normed[:, 1:]).squeeze(-1) if hasattr(self.attn, "token_select") else None,
            self.head_select(x[:, 0]) if hasattr(self, "head_select") else None,
            self.layer_select(x[:, 0]) if hasattr(self, "layer_select") else None,
        )

    def policy(self, logits: BlockLogits, decide: P.Decide) -> P.BlockPolicy:
        """The masks that `decide` makes of the logits."""
        return P.BlockPolicy(
            None if logits.tokens is None else P.with_class_token(decide(logits.tokens, P.TOKEN_THRESHOLD)),
            None if logits.heads is None else decide(logits.heads, P.HEAD_THRESHOLD),
            None if logits.sublayers is None else decide(logits.sublayers, P.SUBLAYER_THRESHOLD),
        )

    def attention_step(self, x: Tensor, normed: Tensor, policy: P.BlockPolicy) -> Tensor:
        """X [B, N, D] after the attention sub-layer."""
        return P.residual(x, self.attn(normed, policy), policy, sublayer=0)

    def mlp_step(self, x: Tensor, policy: P.BlockPolicy) -> Tensor:
        """X [B, N, D] after the MLP sub-layer."""
        return P.residual(x, self.mlp(self.norm2(x), policy), policy, sublayer=1)

    def forward(self, x: Tensor, decide: P.Decide | None) -> tuple[Tensor, BlockLogits, P.BlockPolicy]:
        normed = self.norm1(x)
        logits, policy = BlockLogits(None, None, None), P.BlockPolicy(None, None, None)
        if decide is not None:
            logits = self.decision_logits(x, normed)
            policy = self.policy(logits, decide)
        return self.mlp_step(self.attention_step(x, normed, policy), policy), logits, policy


@dataclass
class Output:
    """What a forward computed.

    Attributes:
        logits: [B, C].
        decisions: per block, the decision logits.
        policies: per block, the masks they gave.
        hidden: per block, its output [B, N, D]; empty unless asked for.
    """

    logits: Tensor
    decisions: list[BlockLogits]
    policies: list[P.BlockPolicy]
    hidden: list[Tensor]

    def stacked(self, arch: Architecture) -> tuple[Tensor, Tensor, Tensor]:
        """The policies as bool tokens [B, L, N], heads [B, L, H], sublayers [B, L, 2]; all true without a policy."""
        batch = self.logits.shape[0]

        def stack(masks: list[Tensor | None], size: int) -> Tensor:
            return torch.stack([torch.ones(batch, size) if m is None else m for m in masks], 1) > 0

        return (
            stack([p.tokens for p in self.policies], arch.tokens),
            stack([p.heads for p in self.policies], arch.heads),
            stack([p.sublayers for p in self.policies], 2),
        )


class AdaViT(nn.Module):
    """A vision transformer that decides per input which tokens, heads and sub-layers to use.

    Computed by masking: nothing is saved, everything is exact. Parameter names are those of the released
    checkpoints.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        if arch.stem == "t2t":
            self.tokens_to_token = TokensToToken(arch)
        else:
            self.patch_embed = PatchEmbed(arch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, arch.tokens, arch.width))
        self.blocks = nn.ModuleList(Block(arch, i) for i in range(arch.depth))
        self.norm = nn.LayerNorm(arch.width, eps=arch.norm_epsilon)
        self.head = nn.Linear(arch.width, arch.classes)

    def embed(self, images: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Pixels [B, 3, S, S] to the first block's input [B, N, D], of the `chosen` patches alone if any are."""
        patches = self.tokens_to_token(images) if self.arch.stem == "t2t" else self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        tokens = tokens + self.pos_embed
        if chosen is None:
            return tokens
        kept = tokens[:, 1:].gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :1], kept], dim=1)

    def forward(
        self,
        images: Tensor,
        decide: P.Decide | None = P.decide,
        hidden: bool = False,
        chosen: Tensor | None = None,
    ) -> Output:
        """Runs the masked model.

        Args:
            images: float32 [B, 3, S, S], normalised.
            decide: how logits become masks; None runs the dense twin, every policy on.
            hidden: keep every block's output.
            chosen: int64 [B, K], the patch tokens to run, for training on some of them; None runs all.
        """
        x = self.embed(images, chosen)
        output = Output(x, [], [], [])
        for block in self.blocks:
            x, logits, policy = block(x, decide)
            output.decisions.append(logits)
            output.policies.append(policy)
            if hidden:
                output.hidden.append(x)
        output.logits = self.classify(x)
        return output

    def classify(self, x: Tensor) -> Tensor:
        """The last block's output [B, N, D] to logits [B, C]."""
        return self.head(self.norm(x)[:, 0])
