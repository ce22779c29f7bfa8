"""A small builder of ONNX graphs: values are names, and every operator is one call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from adavit.bundle.onnx_format import IR_VERSION, PRODUCER, TYPES
from adavit.bundle.tensors import TensorFile

__all__ = ["Builder"]


class Builder:
    """Collects one graph's nodes, weights, inputs and outputs.

    Args:
        name: the graph's name.
        opset: version of the standard operators.
        tensors: the weights that it may refer to.
        location: the name of their file, which lies beside the graph's.
    """

    def __init__(self, name: str, opset: int, tensors: TensorFile, location: str) -> None:
        self.name = name
        self.opset = opset
        self._tensors, self._location = tensors, location
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: list[int | str], dtype: str = "float32") -> str:
        """Declares an input; a dimension is a size, or a name where it varies."""
        self._inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))
        return name

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Embeds a small constant; float64 and Python floats become float32."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        self._weights.setdefault(name, numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def weight(self, name: str, tensor: str) -> str:
        """Refers to a tensor of the weights' file, under a name of its own in this graph."""
        if name not in self._weights:
            found = self._tensors.tensors[tensor]
            proto = TensorProto(name=name, data_type=TYPES[found.dtype], dims=found.shape)
            proto.data_location = TensorProto.EXTERNAL
            place = {"location": self._location, "offset": str(found.offset), "length": str(found.bytes)}
            for key, value in place.items():
                proto.external_data.add(key=key, value=value)
            self._weights[name] = proto
        return name

    def scalar(self, value: float, dtype: str = "float32") -> str:
        """A constant of no dimensions."""
        name = f"scalar_{value!r}" if dtype == "float32" else f"scalar_{value!r}_{dtype}"
        return self.constant(name, np.asarray(value, dtype))

    def ints(self, *values: int) -> str:
        """An int64 vector, such as a shape or a list of axes."""
        return self.constant("ints_" + "_".join(map(str, values)), np.asarray(values, np.int64))

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Adds an operator of one output and returns that output's name."""
        return self.ops(kind, *inputs, outputs=1, name=name, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, name: str | None = None, **attributes: Any) -> list[str]:
        """Adds an operator and returns its outputs' names."""
        node = name or f"{kind.lower()}_{len(self._nodes)}"
        results = [node if outputs == 1 else f"{node}.{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), results, name=node, **attributes))
        return results

    def layer_norm(self, x: str, weight: str, bias: str, epsilon: float, name: str | None = None) -> str:
        """Layer normalisation over the last axis."""
        return self.op("LayerNormalization", x, weight, bias, name=name, axis=-1, epsilon=epsilon)

    def gelu(self, x: str, name: str | None = None, dtype: str = "float32") -> str:
        """The exact GELU; before opset 20 as the operators that backends recognise and fuse."""
        if self.opset >= 20:
            return self.op("Gelu", x, name=name)
        root, one, half = (self.scalar(value, dtype) for value in (math.sqrt(2), 1.0, 0.5))
        error = self.op("Erf", self.op("Div", x, root))
        return self.op("Mul", self.op("Mul", x, self.op("Add", error, one)), half, name=name)

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

    def build(self) -> bytes:
        """The finished model, encoded."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._weights.values())
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name=PRODUCER.decode(), ir_version=IR_VERSION)
        return bytes(model.SerializeToString())
