"""How the linear layers of a graph compute: in fp32, in fp16 between casts, or in int8 between Q/DQ pairs.

Layer normalisations, softmax, decisions and the residual stream stay in fp32: they sum over many values, or every
block adds a little to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from adavit.bundle.keys import Sublayers
from adavit.graphs.builder import Builder

__all__ = ["DENSE_SCALES", "FP32", "Precision", "Units", "input_scale"]

DENSE_SCALES = "dense."
"""How the names of scales begin that the dense twin alone has: it sees every token, with every head."""


@dataclass(frozen=True)
class Precision:
    """Of a sub-layer.

    Attributes:
        name: "fp32", "fp16" or "int8".
        scales: how the names begin of the tensors that hold scales of activations, in int8.
    """

    name: str
    scales: str = ""

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
        if self.name != "int8" or site is None:
            return x
        role = site.rsplit(".", 1)[1]
        scale = graph.weight(f"{prefix}{role}.input_scale", self.scales + input_scale(site))
        zero = graph.constant("zero", np.int8(0))
        codes = graph.op("QuantizeLinear", x, scale, zero)
        return graph.op("DequantizeLinear", codes, scale, zero)

    def leave(self, graph: Builder, y: str) -> str:
        """What was computed, as float32."""
        return graph.op("Cast", y, to=TensorProto.FLOAT) if self.name == "fp16" else y


FP32 = Precision("fp32")


class Units(dict[tuple[int, str], Precision]):
    """The precision of each sub-layer, by its block and "attention" or "mlp"; what is not named is in fp32."""

    def of(self, block: int, sublayers: Sublayers) -> dict[str, Precision]:
        """Of a block's sub-layers that run."""
        return {part: self.get((block, part), FP32) for part, runs in sublayers._asdict().items() if runs}

    def of_dense(self, block: int) -> tuple[Precision, Precision]:
        """Of attention and MLP in the dense twin."""
        attention, mlp = (self.get((block, part), FP32) for part in Sublayers._fields)
        return replace(attention, scales=DENSE_SCALES), replace(mlp, scales=DENSE_SCALES)


def input_scale(site: str) -> str:
    """The tensor that holds the scale of what a linear layer reads, in int8."""
    return f"{site}.input_scale"
