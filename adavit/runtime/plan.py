"""Which of its two engines a sub-layer runs: the one that gathers the kept heads' weights, or the one with all.

Gathered weights lose what the backend prepares ahead for constant ones, and cost a copy when their set of heads is
new. Running all heads and masking the dropped ones costs their multiply-accumulates. Both are exact, so that a plan
changes times and never results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adavit.architecture import Architecture
from adavit.macs import attention_macs, mlp_macs

__all__ = ["SUBLAYERS", "EnginePlan", "ruled"]

SUBLAYERS = ("attention", "mlp")

GATHERED = 1.15
"""Time of a MAC with gathered weights, in MACs with constant ones (62 against 73 GMAC/s on two AVX2 cores)."""
COPIED = 8
"""Time of copying one weight, in MACs: 32 (10 GB/s against 73 GMAC/s) for a set of heads in four that is new."""


@dataclass(frozen=True)
class EnginePlan:
    """Where engines that gather weights are the faster ones.

    Attributes:
        gathers: for K kept tokens and h kept heads, at [K][h], whether attention and MLP gather.
        origin: the file that keeps it, or None for the rule that needs no measurement.
    """

    gathers: list[list[tuple[bool, bool]]]
    origin: str | None = None

    @classmethod
    def where(cls, arch: Architecture, gathers: Callable[[str, int, int], bool]) -> EnginePlan:
        """The plan of a rule for "attention" or "mlp", K and h."""
        heads = range(arch.heads + 1)
        return cls(
            [[(gathers("attention", k, h), gathers("mlp", k, h)) for h in heads] for k in range(arch.tokens + 1)]
        )

    def to_dict(self) -> dict[str, list[str]]:
        """As plain JSON values: by sub-layer and h, a digit 0 or 1 for every K."""
        return {
            kind: ["".join(str(int(row[heads][part])) for row in self.gathers) for heads in range(len(self.gathers[0]))]
            for part, kind in enumerate(SUBLAYERS)
        }

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
        return cls(plan.gathers, origin)


def ruled(arch: Architecture) -> EnginePlan:
    """The plan where nothing has been measured, by two constants."""
    rules = {"attention": gathers_attention, "mlp": gathers_mlp}
    return EnginePlan.where(arch, lambda kind, k, h: rules[kind](arch, k, h))


def gathers_attention(arch: Architecture, kept_tokens: int, kept_heads: int) -> bool:
    """Whether attention with these counts is faster with gathered weights than with all heads, masked."""
    gathered = GATHERED * attention_macs(arch, kept_tokens, kept_heads)
    copied = COPIED * 4 * arch.width * kept_heads * arch.head_width
    return gathered + copied < attention_macs(arch, kept_tokens, arch.heads)


def gathers_mlp(arch: Architecture, kept_tokens: int, kept_heads: int) -> bool:
    """Whether an MLP with these counts is faster with gathered weights; its second layer is never gathered."""
    narrowed = kept_heads * arch.head_width * arch.hidden
    gathered = mlp_macs(arch, kept_tokens, kept_heads) + (GATHERED - 1) * kept_tokens * narrowed
    return gathered + COPIED * narrowed < mlp_macs(arch, kept_tokens, arch.heads)
