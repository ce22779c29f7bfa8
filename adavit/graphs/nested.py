"""A builder of one graph with graphs inside: branches of `If` and bodies of `Loop`, with all weights in the outermost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from adavit.bundle.onnx_format import IR_VERSION, PRODUCER, TYPES
from adavit.bundle.tensors import TensorFile
from adavit.graphs.builder import Builder

__all__ = ["NestedBuilder", "Output"]

TYPES_HERE = {**TYPES, "float64": TensorProto.DOUBLE}
Output = tuple[str, list[int | str]]
"""The type and shape of what a branch makes."""
SMALLEST_HALF = 1024
"""Elements of a weight that is stored in fp16; smaller ones are not worth a node."""


class NestedBuilder(Builder):
    """Collects the nodes of one graph. Weights and constants go to the outermost, and have one name everywhere.

    Args:
        name: the graph's name.
        opset: version of the standard operators.
        tensors: the weights that it may take in.
        half: whether large weights are stored in fp16; the graph computes with them in fp32.
        outer: the graph that this one is inside of, if any.
    """

    def __init__(
        self, name: str, opset: int, tensors: TensorFile, half: bool = False, outer: NestedBuilder | None = None
    ) -> None:
        super().__init__(name, opset, tensors, "")
        self.half = half
        self._root = outer._root if outer else self
        self._count = 0
        self._casts: list[onnx.NodeProto] = []

    def weight(self, name: str, tensor: str) -> str:
        """Takes in a tensor of the weights' file, under its own name."""
        return self.matrix(tensor, lambda: self._tensors.array(tensor))

    def matrix(self, name: str, make: Callable[[], npt.NDArray[Any]]) -> str:
        """Takes in a weight that is made of the file's tensors."""
        root = self._root
        if name not in root._weights:
            value = np.ascontiguousarray(make())
            stored = name
            if root.half and value.dtype == np.float32 and value.size >= SMALLEST_HALF:
                value, stored = value.astype(np.float16), f"{name}.fp16"
                cast = helper.make_node("Cast", [stored], [name], name=name, to=TensorProto.FLOAT)
                root._casts.append(cast)
            root._weights[name] = numpy_helper.from_array(value, stored)
        return name

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Embeds a small constant; float64 and Python floats become float32."""
        return super().constant(name, value) if self._root is self else self._root.constant(name, value)

    def double(self, name: str, value: npt.ArrayLike) -> str:
        """Embeds a small constant in float64."""
        self._root._weights.setdefault(name, numpy_helper.from_array(np.asarray(value, np.float64), name))
        return name

    def ops(self, kind: str, *inputs: str, outputs: int, name: str | None = None, **attributes: Any) -> list[str]:
        """Adds an operator and returns its outputs' names, which no other graph of the file has."""
        self._root._count += 1
        return super().ops(kind, *inputs, outputs=outputs, name=name or f"{kind.lower()}_{self._root._count}", **attributes)

    def inside(self, name: str) -> NestedBuilder:
        """A graph inside this one."""
        return NestedBuilder(name, self.opset, self._tensors, outer=self)

    def branch(
        self,
        condition: str,
        then: Callable[[NestedBuilder], Sequence[str]],
        other: Callable[[NestedBuilder], Sequence[str]],
        outputs: Sequence[Output],
    ) -> list[str]:
        """Adds an `If`; each side returns its values, of the types and shapes of `outputs`."""
        graphs = {}
        self._root._count += 1
        number = self._root._count
        for side, make in (("then", then), ("else", other)):
            graph = self.inside(f"{side}_{number}")
            graph.returns(make(graph), outputs)
            graphs[f"{side}_branch"] = graph.graph()
        return self.ops("If", condition, outputs=len(outputs), **graphs)

    def returns(self, values: Sequence[str], outputs: Sequence[Output]) -> None:
        """Declares what a graph inside makes; what comes from outside, or twice, is passed on by a node of its own."""
        made = {name for node in self._nodes for name in node.output}
        for value, (dtype, shape) in zip(values, outputs, strict=True):
            own = value if value in made else self.op("Identity", value)
            made.discard(own)
            self._outputs.append(helper.make_tensor_value_info(own, TYPES_HERE[dtype], shape))

    def graph(self) -> onnx.GraphProto:
        """The finished graph, without weights where it is inside another one."""
        weights = list(self._weights.values())
        return helper.make_graph(self._casts + self._nodes, self.name, self._inputs, self._outputs, initializer=weights)

    def model(self, metadata: Mapping[str, str], domains: Mapping[str, int]) -> onnx.ModelProto:
        """The finished model."""
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(*domain) for domain in domains.items())]
        model = helper.make_model(
            self.graph(), opset_imports=opsets, producer_name=PRODUCER.decode(), ir_version=IR_VERSION
        )
        helper.set_model_props(model, dict(metadata))
        return model
