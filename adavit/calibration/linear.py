"""The linear layers of the sub-layers: what is converted, and whose inputs have ranges."""

from __future__ import annotations

from typing import NamedTuple

from adavit.architecture import Architecture
from adavit.bundle.keys import ATTENTION

__all__ = ["Linear", "Sublayer", "sublayers_of"]

_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"qkv": ("attn.query", "attn.key", "attn.value"), "proj": ("attn.proj",)},
    "mlp": {"fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)},
}
_READ = {"qkv": "qkv.input", "proj": ATTENTION[1], "fc1": "fc1.input", "fc2": "fc2.input"}


class Linear(NamedTuple):
    """A linear layer, or several that read the same.

    Attributes:
        site: its name in the model, such as "blocks.3.fc1".
        read: the value that it reads, in a graph of its block.
        tensors: how the names of its tensors begin.
    """

    site: str
    read: str
    tensors: tuple[str, ...]


class Sublayer(NamedTuple):
    """A sub-layer of a block.

    Attributes:
        block: its position.
        part: "attention" or "mlp".
    """

    block: int
    part: str

    @property
    def name(self) -> str:
        """As reports name it."""
        return f"blocks.{self.block}.{self.part}"

    def linears(self) -> list[Linear]:
        """Its linear layers, in the order they run; query, key and value are one."""
        block = f"blocks.{self.block}"
        return [
            Linear(f"{block}.{role}", _READ[role], tuple(f"{block}.{name}" for name in names))
            for role, names in _LAYERS[self.part].items()
        ]

    def tensors(self, *kinds: str) -> list[str]:
        """The names of its linear layers' tensors of some kinds: "weight", "bias"."""
        return [f"{name}.{kind}" for linear in self.linears() for name in linear.tensors for kind in kinds]


def sublayers_of(arch: Architecture) -> list[Sublayer]:
    """All sub-layers, in the order they run."""
    return [Sublayer(block, part) for block in range(arch.depth) for part in _LAYERS]
