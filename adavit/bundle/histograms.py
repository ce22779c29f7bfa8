"""What a model's policies kept on a set of images: histograms that builders of engines and budgets read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.policy import Policy

__all__ = ["Statistics"]

Histogram = Mapping[int, int]


@dataclass(frozen=True)
class Statistics:
    """Histograms over images.

    Attributes:
        tokens: for each block, kept tokens (the class token counted) to images.
        heads: for each block, kept heads to images.
        batch: images of a run to runs.

    An image counts in a block whose attention or MLP it runs.
    """

    tokens: tuple[Histogram, ...]
    heads: tuple[Histogram, ...]
    batch: Histogram

    @classmethod
    def of(cls, policy: Policy, batch: Histogram | None = None) -> Statistics:
        """The histograms of what some images kept; without `batch`, as if they came one by one."""

        def histograms(masks: npt.NDArray[np.bool_]) -> tuple[Histogram, ...]:
            counts = masks.sum(2)
            return tuple(
                dict(Counter(counts[policy.sublayers[:, block].any(1), block].tolist()))
                for block in range(counts.shape[1])
            )

        return cls(histograms(policy.tokens), histograms(policy.heads), batch or {1: len(policy)})

    def to_dict(self) -> dict[str, Any]:
        """As it lies in `config.json`, under "statistics"."""
        tokens, heads = ([_to_json(histogram) for histogram in part] for part in (self.tokens, self.heads))
        return {"tokens": tokens, "heads": heads, "batch": _to_json(self.batch)}

    @classmethod
    def from_dict(cls, values: Any, depth: int) -> Statistics:
        """Reads what `to_dict` wrote for a model of `depth` blocks.

        Raises:
            ValueError: it is something else.
        """
        try:
            tokens, heads = (tuple(_histogram(block) for block in values[key]) for key in ("tokens", "heads"))
            batch = _histogram(values["batch"])
        except (KeyError, TypeError, AttributeError):
            raise ValueError("statistics lack tokens, heads or batch") from None
        if len(tokens) != depth or len(heads) != depth:
            raise ValueError(f"statistics are of {len(tokens)} and {len(heads)} blocks, the model has {depth}")
        return cls(tokens, heads, batch)


def merged(histograms: Sequence[Histogram]) -> Histogram:
    """The sum of histograms."""
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return dict(total)


def _to_json(histogram: Histogram) -> dict[str, int]:
    return {str(value): histogram[value] for value in sorted(histogram)}


def _histogram(values: Any) -> Histogram:
    found = {int(value): count for value, count in values.items()}
    if any(value < 0 or type(count) is not int or count < 0 for value, count in found.items()):
        raise ValueError("statistics hold a count that is no number of images")
    return found
