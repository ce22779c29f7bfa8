"""Operating points of one checkpoint: offsets on the decision logits, and the MACs they were measured to take."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from adavit.errors import InputError, shown

if TYPE_CHECKING:
    from adavit.bundle.bundle import Bundle

__all__ = ["NO_POLICIES", "TRAINED", "Budgets", "Offsets", "OperatingPoint", "present", "resolve", "resolve_each"]

MAX_OFFSET = 1000.0
MAX_POINTS = 1000
NO_POLICIES = (
    "this model has no policies, so every image takes the same MACs; train policies with adavit-train adapt "
    "(docs/training.md)"
)

Offset = float | Sequence[float]
"""Of one kind: the same for every block, or one for each."""


@dataclass(frozen=True)
class Offsets:
    """What is added to the decision logits of each kind, of every image, before their thresholds.

    The same as thresholds that are lower by as much: a larger offset keeps whatever a smaller one keeps at the
    same logits. Zeros are the trained policy. A kind's offset is a number for all blocks, or a number for each.

    Raises:
        InputError: an offset is no number, or beyond 1000.
    """

    tokens: Offset = 0.0
    heads: Offset = 0.0
    sublayers: Offset = 0.0

    def __post_init__(self) -> None:
        for kind, value in vars(self).items():
            several = isinstance(value, list | tuple)
            if any(type(v) not in (int, float) or not abs(v) <= MAX_OFFSET for v in (value if several else [value])):
                raise InputError(f"the offset of {kind} is {shown(value)}: expected numbers up to {MAX_OFFSET:g}")
            if several:
                object.__setattr__(self, kind, tuple(value))

    def by_block(self, depth: int) -> list[tuple[float, ...]]:
        """For tokens, heads and sub-layers, the offsets of `depth` blocks.

        Raises:
            InputError: there are offsets for another number of blocks.
        """
        found: dict[str, tuple[float, ...]] = {
            kind: value if isinstance(value, tuple) else (value,) * depth for kind, value in vars(self).items()
        }
        for kind, values in found.items():
            if len(values) != depth:
                raise InputError(f"there are {len(values)} offsets of {kind}: this model has {depth} blocks")
        return list(found.values())

    def toward(self, other: Offsets, share: float) -> Offsets:
        """The offsets on the straight line to `other`: these at share 0, the others at 1."""

        def between(a: Any, b: Any) -> Any:
            if isinstance(a, tuple) or isinstance(b, tuple):
                depth = len(a if isinstance(a, tuple) else b)
                pairs = zip(*(v if isinstance(v, tuple) else (v,) * depth for v in (a, b)), strict=True)
                return tuple(between(*pair) for pair in pairs)
            return a if a == b else (1 - share) * a + share * b  # rounding would turn back what stays

        return Offsets(*map(between, vars(self).values(), vars(other).values()))


TRAINED = Offsets()
"""Of the policy as it was trained."""


@dataclass(frozen=True)
class OperatingPoint:
    """One way to run a bundle.

    Attributes:
        budget: share of the dense MACs that asks for it, in (0, 1].
        offsets: what to run with.
        measured: what it was measured to do on the calibration images: `macs` (mean share of the dense MACs),
            `agreement` with the trained policy's classes, `usage`, and `accuracy` where they had labels.
    """

    budget: float
    offsets: Offsets
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class Budgets:
    """A bundle's operating points.

    Attributes:
        points: by ascending budget; the trained policy is one of them.
        calibration: what they were measured on.
    """

    points: tuple[OperatingPoint, ...]
    calibration: Mapping[str, Any]

    @property
    def trained(self) -> OperatingPoint:
        """The policy as it was trained, which runs where no budget is asked for."""
        return next(point for point in self.points if point.offsets == TRAINED)

    def offsets(self, budget: Any) -> Offsets:
        """The offsets for a budget, on a straight line between those of its neighbours.

        Args:
            budget: share of the dense MACs.

        Raises:
            InputError: it is no number, or beyond the stored points.
        """
        ends = f"{self.points[0].budget:.4g} to {self.points[-1].budget:.4g}"
        if not isinstance(budget, Real) or isinstance(budget, bool):
            raise InputError(f"budget is {shown(budget)}: expected a share of the dense MACs from {ends}")
        try:
            asked = float(budget)
        except Exception:  # of numbers beyond any float, or of a foreign class
            raise InputError(f"budget is {shown(budget)}: expected a share of the dense MACs from {ends}") from None
        if not self.points[0].budget <= asked <= self.points[-1].budget:
            raise InputError(f"budget {asked:g} is out of range: this bundle's go from {ends} of the dense MACs")
        above = bisect_left(self.points, asked, key=lambda point: point.budget)
        high = self.points[above]
        if high.budget == asked:
            return high.offsets
        low = self.points[above - 1]
        return low.offsets.toward(high.offsets, (asked - low.budget) / (high.budget - low.budget))

    @classmethod
    def from_dict(cls, values: Any, depth: int) -> Budgets:
        """Reads what `to_dict` wrote, which may have been altered, for a model of `depth` blocks.

        Raises:
            ValueError: something is missing, of another type or out of bounds.
        """
        found = values["points"]
        if not isinstance(found, list) or not 1 <= len(found) <= MAX_POINTS:
            raise ValueError(f"budgets are not a list of 1 to {MAX_POINTS} points")
        try:
            points = tuple(OperatingPoint(p["budget"], Offsets(**p["offsets"]), dict(p["measured"])) for p in found)
            for point in points:
                point.offsets.by_block(depth)
        except InputError as error:
            raise ValueError(str(error)) from None
        last = 0.0
        for point in points:
            if type(point.budget) not in (int, float) or not last < point.budget <= 1:
                raise ValueError(f"budget {shown(point.budget)} is no share of the dense MACs, or out of order")
            last = point.budget
        if sum(point.offsets == TRAINED for point in points) != 1:
            raise ValueError("not exactly one of the operating points is the trained policy")
        return cls(points, dict(values["calibration"]))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "points": [{**asdict(point), "measured": dict(point.measured)} for point in self.points],
            "calibration": dict(self.calibration),
        }


def present(bundle: Bundle) -> Budgets:
    """The operating points of a bundle; raises InputError where it has none."""
    if bundle.budgets is not None:
        return bundle.budgets
    if not bundle.architecture.adapts:
        raise InputError(f"{bundle.path}: {NO_POLICIES}")
    raise InputError(
        f"{bundle.path}: has no operating points; add them with adavit-export {bundle.path} --budgets 0.3,0.5 "
        "--calibration-images FOLDER"
    )


def resolve(budget: Any, bundle: Bundle) -> Offsets:
    """The offsets that a request asks for.

    Args:
        budget: a share of the dense MACs, offsets themselves, or None for the trained policy.
        bundle: the bundle that runs.

    Raises:
        InputError: the budget is no number or beyond the operating points, or there are none.
    """
    if budget is None:
        return TRAINED
    if isinstance(budget, Offsets):
        return budget
    return present(bundle).offsets(budget)


def resolve_each(budget: Any, bundle: Bundle, images: int) -> Offsets | Sequence[Offsets]:
    """The offsets that a request of some images asks for.

    Args:
        budget: as of `resolve`, for all images, or an array or sequence [images] of shares or offsets.
        bundle: the bundle that runs.
        images: how many.

    Raises:
        InputError: as of `resolve`, or there are budgets for another number of images.
    """
    if isinstance(budget, np.ndarray) and budget.ndim == 1 and budget.dtype.kind in "fiu":
        budget = budget.tolist()
    if not isinstance(budget, list | tuple):
        return resolve(budget, bundle)
    if len(budget) != images:
        raise InputError(f"there are {len(budget)} budgets for {images} images: give one for each, or one for all")
    return [_resolved_one(position, one, bundle) for position, one in enumerate(budget)]


def _resolved_one(position: int, budget: Any, bundle: Bundle) -> Offsets:
    """As `resolve`, for one of several images."""
    try:
        return budget if isinstance(budget, Offsets) else present(bundle).offsets(budget)
    except InputError as error:
        raise InputError(f"image {position}: {error}") from None
