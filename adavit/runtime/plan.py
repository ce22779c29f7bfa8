"""Which of its two engines a sub-layer runs: the one that gathers the kept heads' weights, or the one with all.

Gathered weights lose what the backend prepares ahead for constant ones, and cost a copy when their set of heads is
new. Running all heads and masking the dropped ones costs their multiply-accumulates. Both are exact, so that a plan
changes times and never results.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.macs import attention_macs, mlp_macs
from adavit.runtime.backend import Sizes
from adavit.runtime.policy import Policy

__all__ = [
    "SETS",
    "SUBLAYERS",
    "EnginePlan",
    "HeadSet",
    "ruled",
    "saved_macs",
    "set_kinds",
    "sets_of",
    "sizes_of",
    "sublayers_of",
    "sublayers_run",
]

Int = npt.NDArray[np.int64]

SUBLAYERS = ("attention", "mlp")
SETS = (*SUBLAYERS, "both")
"""The sub-layers that an engine of a set of heads may run."""

GATHERED = 1.15
"""Time of a MAC with gathered weights, in MACs with constant ones (62 against 73 GMAC/s on two AVX2 cores)."""
COPIED = 8
"""Time of copying one weight, in MACs: 32 (10 GB/s against 73 GMAC/s) for a set of heads in four that is new."""
MASKED = 1.06
"""Time of a MAC of attention that can mask heads: the mask, and the values' bias, take operators of their own."""
READ = 20
"""Time of reading one weight from memory, in MACs (27 us a MB against 200 GMAC/s on two Zen 5 cores)."""


CALLS = 8_000_000
"""Time of what a block in one engine spares, in MACs: calls, copies of rows and decisions between them (80 us)."""


class HeadSet(NamedTuple):
    """A set of heads that a block runs with.

    Attributes:
        block: its position.
        kind: the sub-layers that it runs: "attention", "mlp" or "both".
        heads: the kept heads' numbers, ascending.
    """

    block: int
    kind: str
    heads: tuple[int, ...]


def sets_of(policy: Policy) -> Iterator[tuple[int, HeadSet]]:
    """The sets that images' blocks run with, each with the number of its image; blocks without heads have none."""
    for image, block in np.argwhere(policy.sublayers.any(2)).tolist():
        attention, mlp = policy.sublayers[image, block].tolist()
        if heads := tuple(policy.heads[image, block].nonzero()[0].tolist()):
            yield image, HeadSet(block, sublayers_run(attention, mlp), heads)


def sizes_of(policy: Policy) -> Mapping[Sizes, float]:
    """The sizes that images' blocks run with, by how often an image has them."""
    tokens = policy.tokens.sum(2)
    found = (Sizes(s.block, s.kind, int(tokens[image, s.block]), len(s.heads)) for image, s in sets_of(policy))
    return {sizes: times / len(policy) for sizes, times in Counter(found).items()}


def set_kinds(arch: Architecture, block: int) -> tuple[str, ...]:
    """The combinations of sub-layers that a block may run."""
    return SETS if arch.adapts_sublayers(block) else ("both",)


def sublayers_of(kind: str) -> tuple[str, ...]:
    """The sub-layers that one of SETS runs; none of anything else."""
    return tuple(part for part in SUBLAYERS if kind in (part, "both"))


def sublayers_run(attention: bool, mlp: bool) -> str:
    """The one of SETS that a block runs, of which there is at least one."""
    return "both" if attention and mlp else SUBLAYERS[mlp]


@dataclass(frozen=True)
class EnginePlan:
    """Where engines that gather weights are the faster ones, and which sets of heads and sizes have their own engines.

    Attributes:
        gathers: for K kept tokens and h kept heads, at [K][h], whether attention and MLP gather.
        sets: of heads, with engines of their own, whatever `gathers` says.
        sizes: what blocks run with, with engines of their own, by how often an image has them.
        origin: the file that keeps it, or None for the rule that needs no measurement.
    """

    gathers: list[list[tuple[bool, bool]]]
    sets: tuple[HeadSet, ...] = ()
    sizes: Mapping[Sizes, float] = field(default_factory=dict)
    origin: str | None = None

    @classmethod
    def where(cls, arch: Architecture, gathers: Callable[[str, int, int], bool]) -> EnginePlan:
        """The plan of a rule for "attention" or "mlp", K and h."""
        heads = range(arch.heads + 1)
        return cls(
            [[(gathers("attention", k, h), gathers("mlp", k, h)) for h in heads] for k in range(arch.tokens + 1)]
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: by sub-layer and h, a digit 0 or 1 for every K; the sets; and the sizes."""
        gathers = {
            kind: ["".join(str(int(row[heads][part])) for row in self.gathers) for heads in range(len(self.gathers[0]))]
            for part, kind in enumerate(SUBLAYERS)
        }
        sets = [[s.block, s.kind, list(s.heads)] for s in self.sets]
        return {**gathers, "sets": sets, "sizes": [[*sizes, often] for sizes, often in self.sizes.items()]}

    @classmethod
    def from_dict(cls, values: Any, arch: Architecture, origin: str) -> EnginePlan:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: it is not a plan for this architecture.
        """
        for kind in SUBLAYERS:
            lines = values.get(kind) if isinstance(values, dict) else None
            if not isinstance(lines, list) or len(lines) != arch.heads + 1:
                raise ValueError(f"{kind} has no row for each of 0 to {arch.heads} heads")
            if any(type(line) is not str or len(line) != arch.tokens + 1 or set(line) - {"0", "1"} for line in lines):
                raise ValueError(f"{kind} has other rows than of {arch.tokens + 1} digits 0 or 1")
        plan = cls.where(arch, lambda kind, k, h: values[kind][h][k] == "1")
        return cls(plan.gathers, _sets(values.get("sets", []), arch), _sizes(values.get("sizes", []), arch), origin)


def _sets(values: Any, arch: Architecture) -> tuple[HeadSet, ...]:
    """Reads sets of heads; raises ValueError where they are not of this architecture."""
    try:
        sets = tuple(HeadSet(block, kind, tuple(heads)) for block, kind, heads in values)
    except (TypeError, ValueError):
        raise ValueError("sets of heads are not [block, sub-layer, heads]") from None
    for found in sets:
        fits = all(type(number) is int for number in (found.block, *found.heads)) and found.kind in SETS
        fits = fits and 0 <= found.block < arch.depth and _is_kept(arch, found)
        if not fits or not found.heads or list(found.heads) != sorted(set(found.heads) & set(range(arch.heads))):
            raise ValueError(f"{list(found)} is no set of heads of this model")
    return sets


def _sizes(values: Any, arch: Architecture) -> dict[Sizes, float]:
    """Reads sizes; raises ValueError where they are not of this architecture."""
    try:
        found = {Sizes(block, kind, tokens, heads): often for block, kind, tokens, heads, often in values}
    except (TypeError, ValueError):
        raise ValueError("sizes are not [block, sub-layers, tokens, heads, how often]") from None
    for sizes, often in found.items():
        limits = (range(arch.depth), range(1, arch.tokens + 1), range(1, arch.heads + 1))
        numbers = sizes.block, sizes.tokens, sizes.heads
        fits = all(type(number) is int and number in limit for number, limit in zip(numbers, limits, strict=True))
        if not fits or sizes.kind not in SETS or type(often) not in (int, float) or not 0 < often < math.inf:
            raise ValueError(f"{[*sizes, often]} is no size of this model's blocks")
    return found


def _is_kept(arch: Architecture, found: HeadSet) -> bool:
    """Whether a block's policies can keep no more than a set's heads and sub-layers."""
    return (arch.adapts_heads(found.block) or len(found.heads) == arch.heads) and (
        arch.adapts_sublayers(found.block) or found.kind == "both"
    )


def ruled(arch: Architecture, always: bool = False) -> EnginePlan:
    """The plan where nothing has been measured, by two constants, or to gather always."""
    tokens, heads = np.arange(arch.tokens + 1)[:, None], np.arange(arch.heads + 1)[None]
    attention = mlp = np.broadcast_to(heads > 0, (arch.tokens + 1, arch.heads + 1))
    if not always:
        attention, mlp = gathers_attention(arch, tokens, heads), gathers_mlp(arch, tokens, heads)
    return EnginePlan([list(zip(*pair, strict=True)) for pair in zip(attention.tolist(), mlp.tolist(), strict=True)])


def saved_macs(arch: Architecture, kind: str, kept_tokens: int, kept_heads: int) -> float:
    """What a block gains that runs in one engine with its heads' weights as constants, as time in MACs.

    Against the faster ones of the other engines; kind is one of SETS.
    """
    return CALLS + sum(_saved_macs(arch, part, kept_tokens, kept_heads) for part in sublayers_of(kind))


def _saved_macs(arch: Architecture, kind: str, kept_tokens: int, kept_heads: int) -> float:
    """What a sub-layer gains of it."""
    macs, weights = (attention_macs, 4 * arch.width) if kind == "attention" else (mlp_macs, arch.hidden)
    own, dropped = macs(arch, kept_tokens, kept_heads), arch.heads - kept_heads
    gathered = (GATHERED - 1) * own + COPIED * weights * kept_heads * arch.head_width
    everything = (MASKED if kind == "attention" else 1) * macs(arch, kept_tokens, arch.heads)
    masked = everything - own + READ * weights * dropped * arch.head_width
    return min(gathered, masked)


def gathers_attention(arch: Architecture, kept_tokens: Int, kept_heads: Int) -> npt.NDArray[np.bool_]:
    """Whether attention with these counts is faster with gathered weights than with all heads, masked."""
    gathered = GATHERED * attention_macs(arch, kept_tokens, kept_heads)
    copied = COPIED * 4 * arch.width * kept_heads * arch.head_width
    return gathered + copied < attention_macs(arch, kept_tokens, np.asarray(arch.heads))


def gathers_mlp(arch: Architecture, kept_tokens: Int, kept_heads: Int) -> npt.NDArray[np.bool_]:
    """Whether an MLP with these counts is faster with gathered weights; its second layer is never gathered."""
    narrowed = kept_heads * arch.head_width * arch.hidden
    gathered = mlp_macs(arch, kept_tokens, kept_heads) + (GATHERED - 1) * kept_tokens * narrowed
    return gathered + COPIED * narrowed < mlp_macs(arch, kept_tokens, np.asarray(arch.heads))
