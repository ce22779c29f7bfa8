"""How the linear layers of a graph compute: in fp32, in fp16 between casts, or in int8 between Q/DQ pairs.

Layer normalisations, softmax, decisions and the residual stream stay in fp32: they sum over many values, or every
block adds a little to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from adavit.export.graphs.builder import Builder

__all__ = ["FP16", "FP32", "Precision", "input_scale"]


@dataclass(frozen=True)
class Precision:
    """Of a sub-layer or the dense twin.

    Attributes:
        name: "fp32", "fp16" or "int8".
        sites: the linear layers that run in int8, such as "blocks.3.fc1"; others stay in fp32.
    """

    name: str
    sites: frozenset[str] = frozenset()

    @property
    def dtype(self) -> str:
        """Of the weights that linear layers are handed."""
        return "float16" if self.name == "fp16" else "float32"

    def enter(self, graph: Builder, x: str, site: str | None = None, prefix: str = "") -> str:
        """What a linear layer reads of x, float32; without a site, a product of two activations.

        Args:
            graph: where to add.
            x: the value.
            site: the linear layer.
            prefix: of the names of weights in this graph.
        """
        if self.name == "fp16":
            return graph.op("Cast", x, to=TensorProto.FLOAT16)
        if site not in self.sites:
            return x
        role = site.rsplit(".", 1)[1]
        scale = graph.weight(f"{prefix}{role}.input_scale", input_scale(site))
        zero = graph.constant("zero", np.int8(0))
        codes = graph.op("QuantizeLinear", x, scale, zero)
        return graph.op("DequantizeLinear", codes, scale, zero)

    def leave(self, graph: Builder, y: str) -> str:
        """What was computed, as float32."""
        return graph.op("Cast", y, to=TensorProto.FLOAT) if self.name == "fp16" else y


FP32, FP16 = Precision("fp32"), Precision("fp16")


def input_scale(site: str) -> str:
    """The tensor that holds the scale of what a linear layer reads, in int8."""
    return f"{site}.input_scale"
