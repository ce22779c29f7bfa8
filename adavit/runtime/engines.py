"""The engines of a bundle, loaded and by their part in a block."""

from __future__ import annotations

from dataclasses import dataclass, fields

from adavit.runtime.backend import Backend, Engine
from adavit.runtime.bundle import Bundle

__all__ = ["BlockEngines", "Engines"]


@dataclass(frozen=True)
class BlockEngines:
    """One block's engines; those that gather heads' weights are there where the block has a head policy."""

    decide: Engine
    attention: Engine
    mlp: Engine
    attention_gather: Engine | None = None
    attention_weights: Engine | None = None
    mlp_gather: Engine | None = None
    mlp_weights: Engine | None = None


_ALWAYS = ("decide", "attention", "mlp")


class Engines:
    """All engines of a bundle but its dense twin.

    Attributes:
        stem, head: what runs before the blocks, and after them.
        blocks: each block's engines.
        empty: what attention and MLP of every block add without a head, each [L, D].
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        arch = bundle.architecture

        def block(index: int) -> BlockEngines:
            kinds = [field.name for field in fields(BlockEngines)] if arch.adapts_heads(index) else _ALWAYS
            return BlockEngines(**{kind: backend.load(f"blocks.{index}.{kind}") for kind in kinds})

        self.stem, self.head = backend.load("stem"), backend.load("head")
        self.blocks = [block(index) for index in range(arch.depth)]
        self.empty = backend.buffer((arch.depth, arch.width)), backend.buffer((arch.depth, arch.width))
        if arch.head_policy:
            backend.load("empty").run([], [vectors.rows(arch.depth) for vectors in self.empty])
