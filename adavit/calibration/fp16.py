"""Sub-layers in fp16: their weights, and the intermediate values that fp16 has to hold.

Layer normalisations, the softmax and the residual stream stay in fp32: they sum over many values, or every block adds
a little to them. So do the stem, the decisions and the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.onnx_graph import OnnxGraph
from adavit.calibration.linear import Sublayer

__all__ = ["FP16_MAX", "halved_values", "to_fp16"]

FP16_MAX = 65504 / 2
"""Largest magnitude seen in calibration that fp16 is trusted with: half of what it can hold."""

Tensors = Mapping[str, npt.NDArray[Any]]


def to_fp16(tensors: Tensors, sublayer: Sublayer) -> dict[str, npt.NDArray[Any]]:
    """The weights and biases of a sub-layer's linear layers as float16, by name."""
    names = sublayer.tensors("weight", "bias")
    return {name: tensors[name].astype(np.float16) for name in names if name in tensors}


def halved_values(graph: OnnxGraph, first: Mapping[str, Sublayer]) -> dict[str, Sublayer]:
    """The values of an fp32 graph that would be float16 in fp16, and whose they are.

    They reach from what a sub-layer's first linear layer reads to the sum that adds the residual stream, which is
    float32 again.

    Args:
        graph: a block's, or the dense twin.
        first: by the value that its first linear layer reads, the sub-layer.
    """
    given = ({value.name for value in graph.inputs} | set(graph.weights)) - {"x"}
    found: dict[str, Sublayer] = {}
    for node in graph.nodes:
        name = node.outputs[0]
        of = next((found[value] for value in node.inputs if value in found), None)
        residual = node.op == "Add" and not all(value in found or value in given for value in node.inputs)
        if name in first:
            found[name] = first[name]
        elif of is not None and not residual:
            found[name] = of
    return found
