"""What a block runs: typed keys, so that no name is ever parsed."""

from __future__ import annotations

from typing import NamedTuple

from adavit.architecture import Architecture

__all__ = [
    "ATTENTION",
    "BETWEEN",
    "BOTH",
    "GOES_ON",
    "NONE",
    "NOT_FINITE",
    "OVERFLOWED",
    "STATE_BEHIND",
    "STATE_BETWEEN",
    "BlockKey",
    "Sublayers",
    "combinations",
]


class Sublayers(NamedTuple):
    """Which sub-layers of a block run."""

    attention: bool
    mlp: bool

    @property
    def name(self) -> str:
        """As files and reports name the combination."""
        return {(True, True): "both", (True, False): "attention", (False, True): "mlp"}.get(
            (self.attention, self.mlp), "none"
        )


ATTENTION = ("projected", "mixed")
"""The names of the first and the last node between which a graph mixes tokens: from norm1(x) [K, D] to [K, c]."""

BETWEEN, STATE_BETWEEN, STATE_BEHIND = "x_between", "state_between", "state_behind"
"""What a graph of a batch has between attention and MLP, tokens and states, and states behind the MLP."""

GOES_ON, OVERFLOWED, NOT_FINITE = range(3)
"""States of an image in a batch."""

BOTH, NONE = Sublayers(True, True), Sublayers(False, False)


class BlockKey(NamedTuple):
    """What a block runs of its sub-layers and heads.

    Attributes:
        block: its position.
        sublayers: that run.
        heads: the numbers of those that are kept, ascending; empty where no sub-layer runs.
    """

    block: int
    sublayers: Sublayers
    heads: tuple[int, ...]


def combinations(arch: Architecture, block: int) -> tuple[Sublayers, ...]:
    """The combinations of sub-layers that a block may run."""
    if not arch.adapts_sublayers(block):
        return (BOTH,)
    return BOTH, Sublayers(True, False), Sublayers(False, True), NONE
