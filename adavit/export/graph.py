"""A small builder of ONNX graphs: values are names, and every operator is one call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["CONTRIB", "OPSETS", "TYPES", "Graph"]

OPSETS = range(17, 24)
"""Opsets that can be asked for: LayerNormalization came with 17; 23 is the newest every backend here reads."""

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
_IR_VERSION = 10  # Read by ONNX Runtime 1.20, TensorRT 10 and OpenVINO 2025 onwards.
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
"""ONNX's numbers of the types that engines take and give."""


class Graph:
    """Collects one engine's nodes, weights, inputs and outputs.

    Args:
        name: the engine's name.
        opset: version of the standard operators.
    """

    def __init__(self, name: str, opset: int) -> None:
        self.name = name
        self.opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: list[int | str], dtype: str = "float32") -> str:
        """Declares an input; a dimension is a size, or a name where it varies."""
        self._inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))
        return name

    def weight(self, name: str, value: npt.ArrayLike) -> str:
        """Embeds a constant; float64 and Python floats become float32."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        self._weights.setdefault(name, numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def scalar(self, value: float) -> str:
        """A float32 constant of no dimensions."""
        return self.weight(f"scalar_{value!r}", np.float32(value))

    def ints(self, *values: int) -> str:
        """An int64 vector, such as a shape or a list of axes."""
        return self.weight("ints_" + "_".join(map(str, values)), np.asarray(values, np.int64))

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Adds an operator of one output and returns that output's name."""
        return self.ops(kind, *inputs, outputs=1, name=name, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, name: str | None = None, **attributes: Any) -> list[str]:
        """Adds an operator and returns its outputs' names."""
        node = name or f"{kind.lower()}_{len(self._nodes)}"
        results = [node if outputs == 1 else f"{node}.{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), results, name=node, **attributes))
        return results

    def layer_norm(self, x: str, weight: str, bias: str, epsilon: float) -> str:
        """Layer normalisation over the last axis."""
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)

    def gelu(self, x: str) -> str:
        """The exact GELU; before opset 20 as the operators that backends recognise and fuse."""
        if self.opset >= 20:
            return self.op("Gelu", x)
        error = self.op("Erf", self.op("Div", x, self.scalar(math.sqrt(2))))
        return self.op("Mul", self.op("Mul", x, self.op("Add", error, self.scalar(1.0))), self.scalar(0.5))

    def output(self, name: str, value: str, shape: list[int | str], dtype: str = "float32") -> None:
        """Declares `value` as the output `name`."""
        for node in reversed(self._nodes):
            if value in node.output:
                node.output[list(node.output).index(value)] = name
                break
        for node in self._nodes:
            for i, source in enumerate(node.input):
                if source == value:
                    node.input[i] = name
        self._outputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))

    def build(self) -> onnx.ModelProto:
        """The finished and checked model."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._weights.values())
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain == CONTRIB for node in self._nodes):
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(graph, opset_imports=opsets, producer_name="adavit", ir_version=_IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model
