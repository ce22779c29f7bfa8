"""Optimisation profiles: the shapes an engine is built for, and those it is tuned for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adavit.architecture import Architecture
from adavit.bundle.histograms import Histogram, Statistics
from adavit.bundle.onnx_format import Value

__all__ = ["Profile", "Range", "profiles_of", "split"]

MOST = 3
"""Profiles of an engine."""
PAYS = 0.25
"""What one more profile must bring its sizes closer to the one tuned for, in octaves, on average."""

COUNTED = {"B": "B", "K": "K", "h": "h", "c": "h", "3c": "h"}
"""Names of dimensions in graphs, and what they grow with: images, kept tokens or kept heads."""


@dataclass(frozen=True)
class Range:
    """The sizes of a dimension: the least, the one to tune for, the largest."""

    least: int
    tuned: int
    most: int

    def times(self, factor: int) -> Range:
        """The range of `factor` times the size."""
        return Range(self.least * factor, self.tuned * factor, self.most * factor)


Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""For each input, the least shape, the one to tune for, and the largest."""


def profiles_of(
    inputs: Sequence[Value], block: int | None, arch: Architecture, statistics: Statistics | None, max_batch: int
) -> list[Profile]:
    """The profiles of an engine: one, or where the sizes that statistics tell are far apart, several.

    Without statistics, engines are tuned for one image, every token and half of the heads.

    Args:
        inputs: of the graph. Dimensions are called B (images), K (kept tokens), h (kept heads), c (their channels) or
            3c (those of queries, keys and values).
        block: whose graph it is; None for others.
        arch: the model's shapes.
        statistics: what images kept.
        max_batch: images of a run at most.

    Raises:
        ValueError: a dimension has another name.
    """
    names = [size for value in inputs for size in value.shape if isinstance(size, str)]
    if unknown := set(names) - set(COUNTED):
        raise ValueError(f"a graph has a dimension {min(unknown)!r}, for which there is no profile")
    counted = list(dict.fromkeys(COUNTED[name] for name in names))
    ranges = {
        name: split(*_sizes(name, block, arch, statistics, max_batch), MOST if name == counted[0] else 1)
        for name in counted
    }
    if "h" in ranges and block is not None and not arch.adapts_heads(block):
        ranges["h"] = [Range(arch.heads, arch.heads, arch.heads)]
    several = max((len(found) for found in ranges.values()), default=1)
    return [
        {
            value.name: _shapes(value.shape, {name: r[min(i, len(r) - 1)] for name, r in ranges.items()}, arch)
            for value in inputs
        }
        for i in range(several)
    ]


def _shapes(
    shape: tuple[int | str, ...], ranges: Mapping[str, Range], arch: Architecture
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    channels = {"c": arch.head_width, "3c": 3 * arch.head_width}

    def range_of(size: int | str) -> Range:
        if isinstance(size, int):
            return Range(size, size, size)
        return ranges[COUNTED[size]].times(channels.get(size, 1))

    found = [range_of(size) for size in shape]
    return tuple(r.least for r in found), tuple(r.tuned for r in found), tuple(r.most for r in found)


def _sizes(
    dimension: str, block: int | None, arch: Architecture, statistics: Statistics | None, max_batch: int
) -> tuple[Histogram, int]:
    """How often a dimension of an engine has which size, and its largest size."""
    most, tuned = {"B": (max_batch, 1), "K": (arch.tokens, arch.tokens), "h": (arch.heads, math.ceil(arch.heads / 2))}[
        dimension
    ]
    if statistics is None:
        return {tuned: 1}, most
    if dimension == "B" or block is None:
        found = statistics.batch
    else:
        found = (statistics.tokens if dimension == "K" else statistics.heads)[block]
    found = {size: count for size, count in found.items() if 1 <= size <= most and count}
    return found or {tuned: 1}, most


def split(sizes: Histogram, most: int, profiles: int) -> list[Range]:
    """Cuts 1 to `most` into ranges, each tuned for the median of the sizes in it.

    A cut is made where it brings sizes closest to the one tuned for, while that is worth it.
    """
    parts = [sorted(sizes.items())]
    total = sum(sizes.values())
    while len(parts) < profiles:
        gains = [
            (_distance(part) - _distance(part[:cut]) - _distance(part[cut:]), index, cut)
            for index, part in enumerate(parts)
            for cut in range(1, len(part))
        ]
        gain, index, cut = max(gains, default=(0.0, 0, 0))
        if gain < PAYS * total:
            break
        parts[index : index + 1] = [parts[index][:cut], parts[index][cut:]]
    ends = [*(part[-1][0] for part in parts[:-1]), most]
    return [
        Range(least, _median(part), end)
        for part, least, end in zip(parts, [1, *(end + 1 for end in ends)], ends, strict=False)
    ]


def _median(part: list[tuple[int, int]]) -> int:
    below, total = 0, sum(count for _, count in part)
    for size, count in part:
        below += count
        if 2 * below >= total:
            return size
    raise ValueError("no sizes")


def _distance(part: list[tuple[int, int]]) -> float:
    """How far the sizes are from their median, in octaves, summed."""
    median = _median(part)
    return sum(count * abs(math.log2(size / median)) for size, count in part)
