"""Listens to a forward for what distillation compares: class-token attention and class-token states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adavit.model.adavit import AdaViT, Block
from adavit.model.policy import BlockPolicy

__all__ = ["Recording", "record"]


@dataclass
class Recording:
    """What the last forward passed through.

    Attributes:
        queries: per block, the class token's, [B, D]; keys: per block, [B, N, D].
        states: per block, the class token [B, D] after attention and after the MLP.
    """

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets the last forward."""
        for kept in (self.queries, self.keys, self.states):
            kept.clear()

    def attention(self, block: int, heads: int, policy: BlockPolicy | None = None) -> Tensor:
        """Class-token attention of a block under its policy, [B, H, N]."""
        query = self.queries[block].float().unflatten(-1, (heads, -1))
        key = self.keys[block].float().unflatten(-1, (heads, -1))
        scores = (query[:, None] * key).sum(-1).transpose(1, 2) * query.shape[-1] ** -0.5
        if policy is not None and policy.tokens is not None:
            scores = scores.masked_fill(policy.tokens.detach()[:, None, :] == 0, float("-inf"))
        return scores.softmax(-1)


@contextmanager
def record(model: AdaViT) -> Iterator[Recording]:
    """Fills the recording at every forward of the model, the last one only."""
    recording = Recording()

    def keep_query(_module: Any, _inputs: Any, output: Tensor) -> None:
        recording.queries.append(output[:, 0])

    def keep_keys(_module: Any, _inputs: Any, output: Tensor) -> None:
        recording.keys.append(output)

    def keep_middle(_module: Any, inputs: tuple[Tensor]) -> None:
        recording.states.append(inputs[0][:, 0])

    def keep_output(_module: Any, _inputs: Any, output: tuple[Tensor, Any, Any]) -> None:
        recording.states.append(output[0][:, 0])

    handles = [model.register_forward_pre_hook(lambda _module, _inputs: recording.clear())]
    for block in model.blocks:
        assert isinstance(block, Block)
        handles += [
            block.attn.query.register_forward_hook(keep_query),
            block.attn.key.register_forward_hook(keep_keys),
            block.norm2.register_forward_pre_hook(keep_middle),
            block.register_forward_hook(keep_output),
        ]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()
