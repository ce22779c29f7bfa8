"""The precision of each sub-layer, and weights in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.calibration.fp16 import FP16_MAX, to_fp16
from adavit.calibration.int8 import input_scales, to_int8
from adavit.calibration.linear import Sublayer, sublayers_of
from adavit.calibration.ranges import DENSE, Ranges
from adavit.graphs.precision import DENSE_SCALES, Precision, Units

__all__ = ["Assigned", "Assignment", "assign", "converted"]

MIN_SAMPLES = 4
"""Images that must reach a sub-layer for int8: ranges come from their tokens, about a hundred each."""

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Assignment:
    """The precision of a sub-layer, and why it is not the one asked for."""

    precision: str
    reason: str | None = None


Assigned = Mapping[Sublayer, Assignment]


def assign(arch: Architecture, ranges: Ranges, precision: str) -> dict[Sublayer, Assignment]:
    """Gives every sub-layer the precision, or the next higher one that its calibration allows."""
    found = {}
    for sublayer in sublayers_of(arch):
        samples, peak = ranges.seen[sublayer.name].samples, ranges.peaks.get(sublayer.name, 0.0)
        wanted, reason = precision, None
        if wanted == "int8" and samples < MIN_SAMPLES:
            wanted, reason = "fp16", f"only {samples} of the images reach it"
        if samples == 0:
            wanted, reason = "fp32", "no image reaches it"
        elif wanted == "fp16" and peak > FP16_MAX:
            wanted, reason = "fp32", f"its values reach {peak:.0f}, too near fp16's end"
        found[sublayer] = Assignment(wanted, reason)
    return found


def converted(
    tensors: Tensors, assigned: Assigned, ranges: Ranges, method: str
) -> tuple[dict[str, npt.NDArray[Any]], Units]:
    """A model's weights in the precisions assigned to its sub-layers, and what its graphs are to compute in.

    Args:
        tensors: the weights in fp32, by name.
        assigned: the precision of each sub-layer.
        ranges: of what linear layers read.
        method: how int8's scales are taken from them.
    """
    found, units = dict(tensors), Units()
    for sublayer, assignment in assigned.items():
        units[sublayer] = Precision(assignment.precision)
        if assignment.precision == "fp16":
            found |= to_fp16(tensors, sublayer)
        elif assignment.precision == "int8":
            found |= to_int8(tensors, sublayer)
            found |= input_scales(ranges.histograms[sublayer.name], sublayer, method)
            if DENSE in ranges.histograms:
                found |= input_scales(ranges.histograms[DENSE], sublayer, method, DENSE_SCALES)
    return found, units
