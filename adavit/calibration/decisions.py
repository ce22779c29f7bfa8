"""Decision logits of many images, recorded at some offsets, and what they predict of other offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.operating_points import MAX_OFFSET, Offsets
from adavit.macs import block_macs, dense_macs, outside_macs
from adavit.measure.compare import KINDS

__all__ = ["Decisions", "Unit", "shifted", "units_of"]

Float = npt.NDArray[np.float32]
Unit = tuple[str, int]
"""The decisions of one kind in one block."""
BEYOND = 1e-3
"""How far behind the last logit an offset goes that keeps or drops everything."""


def units_of(arch: Architecture) -> list[Unit]:
    """What a model decides on."""
    units = [("tokens", block) for block in range(arch.depth) if arch.token_policy]
    for block in range(arch.depth):
        units += [("heads", block)] * arch.adapts_heads(block) + [("sublayers", block)] * arch.adapts_sublayers(block)
    return units


def shifted(offsets: Offsets, depth: int, changes: dict[Unit, float]) -> Offsets:
    """The offsets with those of some units changed, within their bounds."""
    values = dict(zip(KINDS, map(list, offsets.by_block(depth)), strict=True))
    for (kind, block), by in changes.items():
        values[kind][block] = min(MAX_OFFSET, max(-MAX_OFFSET, values[kind][block] + by))
    return Offsets(**{kind: tuple(row) for kind, row in values.items()})


@dataclass(frozen=True)
class Decisions:
    """Logits less their thresholds, of n images, as the model makes them with some offsets.

    A prediction takes them as they are at any offsets. So it is exact up to the first decision that turns out another
    way, and near to what the model does behind it.

    Attributes:
        arch: the model's shapes.
        offsets: what the images ran with.
        margins: by kind, [n, L, M] of M tokens without the class token, heads or sub-layers; infinite in blocks that do
            not decide on them.
    """

    arch: Architecture
    offsets: Offsets
    margins: dict[str, Float]

    @classmethod
    def of(cls, arch: Architecture, offsets: Offsets, found: Sequence[Sequence[dict[str, Float]]]) -> Decisions:
        """From what `ObservedRuntime.run` tells of images and their blocks."""
        sizes = {"tokens": arch.tokens - 1, "heads": arch.heads, "sublayers": 2}
        margins = {kind: np.full((len(found), arch.depth, size), np.inf, np.float32) for kind, size in sizes.items()}
        for position, blocks in enumerate(found):
            for block, kinds in enumerate(blocks):
                for kind, values in kinds.items():
                    margins[kind][position, block] = values
        return cls(arch, offsets, margins)

    def __len__(self) -> int:
        return len(self.margins["tokens"])

    def kept(self, offsets: Offsets) -> dict[str, npt.NDArray[np.bool_]]:
        """What these offsets would keep, by kind, [n, L, M]."""
        rows = zip(KINDS, offsets.by_block(self.arch.depth), strict=True)
        return {kind: self.margins[kind] > -np.asarray(values, np.float32)[:, None] for kind, values in rows}

    def macs(self, offsets: Offsets, count: int | None = None) -> float:
        """The mean share of the dense MACs that they would take, on the first `count` images."""
        kept = {kind: mask[:count] for kind, mask in self.kept(offsets).items()}
        tokens, heads = (np.count_nonzero(kept[kind], -1) for kind in ("tokens", "heads"))
        runs = kept["sublayers"].astype(np.int64)
        blocks = block_macs(self.arch, 1 + tokens, heads, runs[..., 0], runs[..., 1])
        return float((outside_macs(self.arch) + blocks.sum(1)).mean() / dense_macs(self.arch))

    def changed(self, offsets: Offsets) -> npt.NDArray[np.bool_]:
        """Whether the offsets compute something else of an image [n]; a block that runs nothing is the same block."""
        before, after = self.kept(self.offsets), self.kept(offsets)
        runs = after["sublayers"].any(-1)
        differs = (before["sublayers"] != after["sublayers"]).any((1, 2))
        for kind in ("tokens", "heads"):
            differs |= ((before[kind] != after[kind]).any(-1) & runs).any(1)
        return np.asarray(differs, bool)

    def reach(self, unit: Unit) -> tuple[float, float]:
        """The changes of a unit's offset, from the recorded one, that drop all of it and that keep all of it."""
        kind, block = unit
        margins = self.margins[kind][:, block] + self.offsets.by_block(self.arch.depth)[KINDS.index(kind)][block]
        return min(0.0, -float(margins.max()) - BEYOND), max(0.0, BEYOND - float(margins.min()))
