"""Sub-layers in int8: the codes and scales of their weights, and the scales of what their linear layers read.

Activations take one scale per tensor and 8 bits. Weights take one scale per output channel and 7 bits: CPUs
without VNNI add two products of unsigned and signed bytes in 16 bits, which saturates with 8-bit weights, in
ONNX Runtime as in OpenVINO. With 7 bits the integers are exact, and every backend computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.calibration.histogram import Histogram
from adavit.calibration.linear import Sublayer
from adavit.graphs.precision import input_scale

__all__ = ["input_scales", "to_int8"]

ACTIVATION_LEVELS = 127
WEIGHT_LEVELS = 64

Tensors = Mapping[str, npt.NDArray[Any]]


def to_int8(tensors: Tensors, sublayer: Sublayer) -> dict[str, npt.NDArray[Any]]:
    """The weights of a sub-layer's linear layers by name: int8 codes [out, in], scales and zero points [out]."""
    found: dict[str, npt.NDArray[Any]] = {}
    for name in sublayer.tensors("weight"):
        weight = tensors[name]
        largest = np.abs(weight).max(1)
        scale = np.where(largest > 0, largest / np.float32(WEIGHT_LEVELS), np.float32(1)).astype(np.float32)
        found[name] = np.rint(weight / scale[:, None]).astype(np.int8)
        found[f"{name}.scale"] = scale
        found[f"{name}.zero"] = np.zeros(len(scale), np.int8)
    return found


def input_scales(
    histograms: Mapping[str, Histogram], sublayer: Sublayer, method: str, prefix: str = ""
) -> dict[str, npt.NDArray[Any]]:
    """The scales of what a sub-layer's linear layers read, scalars by name.

    Args:
        histograms: of the values, by site.
        sublayer: whose.
        method: how a range is taken from a histogram.
        prefix: of the scales' names.
    """
    found = {}
    for linear in sublayer.linears():
        threshold = histograms[linear.site].threshold(method) or 1.0  # 0: all values are 0
        found[prefix + input_scale(linear.site)] = np.asarray(threshold / ACTIVATION_LEVELS, np.float32)
    return found
