"""An fp32 bundle's engines in the precision that each is to have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from adavit.calibration.fp16 import FP16_MAX, to_fp16
from adavit.calibration.int8 import to_int8, weights_to_int8
from adavit.calibration.linear import unit
from adavit.calibration.ranges import Ranges
from adavit.bundle.bundle import Bundle

__all__ = ["Assignment", "assign", "converted", "engine_precision"]

MIN_SAMPLES = 4
"""Images that must reach a sub-layer for int8: ranges come from their tokens, about a hundred each."""


@dataclass(frozen=True)
class Assignment:
    """The precision of a unit (a sub-layer, or "dense"), and why it is not the one asked for."""

    precision: str
    reason: str | None = None


def assign(bundle: Bundle, ranges: Ranges, precision: str) -> dict[str, Assignment]:
    """Gives every unit the precision, or the next higher one that its calibration allows."""
    units = [name for name in bundle.engines if name == "dense" or name.endswith((".attention", ".mlp"))]
    found = {}
    for name in units:
        samples = ranges.samples(name)
        wanted, reason = precision, None
        if wanted == "int8" and samples < MIN_SAMPLES:
            wanted, reason = "fp16", f"only {samples} of the images reach it"
        if samples == 0:
            wanted, reason = "fp32", "no image reaches it"
        elif wanted == "fp16" and ranges.peaks[name] > FP16_MAX:
            wanted, reason = "fp32", f"its values reach {ranges.peaks[name]:.0f}, too near fp16's end"
        found[name] = Assignment(wanted, reason)
    return found


def engine_precision(name: str, assigned: Mapping[str, Assignment], decisions: str) -> str:
    """The precision of an engine. Stem, head and `empty` stay in fp32: every decision depends on the stem."""
    if name.endswith(".decide"):
        return decisions
    precision = assigned[unit(name)].precision if unit(name) in assigned else "fp32"
    # All weights of attention_gather are handed to it, see `weights_to_int8`.
    return "fp32" if precision == "int8" and name.endswith(".attention_gather") else precision


def converted(
    bundle: Bundle,
    ranges: Ranges,
    assigned: Mapping[str, Assignment],
    method: str,
    precisions: Mapping[str, str],
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yields (name, model) of every engine that has a precision, in it."""
    for name, precision in precisions.items():
        yield name, _engine(bundle, ranges, assigned, method, name, precision)


def _engine(
    bundle: Bundle, ranges: Ranges, assigned: Mapping[str, Assignment], method: str, name: str, precision: str
) -> onnx.ModelProto:
    model = onnx.load_from_string(bundle.read(name))
    if precision == "fp32":
        return model
    if precision == "fp16":
        return to_fp16(model)
    if name.endswith("_weights"):
        return weights_to_int8(model)
    thresholds = {
        site: found.threshold(method)
        for site, found in ranges.histograms[unit(name)].items()
        if assigned[_unit_of(site)].precision == "int8"
    }
    return to_int8(model, thresholds, bundle.architecture.head_width)


def _unit_of(site: str) -> str:
    """The sub-layer of a linear layer."""
    block, role = site.rsplit(".", 1)
    return f"{block}.{'attention' if role in ('qkv', 'proj') else 'mlp'}"
