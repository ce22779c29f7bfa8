"""A builder of one graph with graphs inside: branches of `If` and the body of a `Loop`.

All weights lie in the outermost graph, each once. The graphs inside refer to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from adavit.bundle.onnx_format import PRODUCER, TYPES
from adavit.bundle.tensors import TensorFile
from adavit.graphs.builder import Builder

__all__ = ["Made", "NestedBuilder"]

IR_VERSION = 9
"""Of opset 20: ONNX Runtime 1.17 and later read it."""
SMALLEST_HALF = 1024
"""Elements of a weight that is stored in fp16; smaller ones are not worth a node."""

Made = tuple[str, list[int | str]]
"""The type and the shape of what a graph inside makes."""


class NestedBuilder(Builder):
    """Collects the nodes of one graph; each name is one value in the whole file.

    Args:
        name: the graph's name.
        opset: version of the standard operators.
        tensors: the weights that it may take in.
        half: whether large weights are stored in fp16. The graph computes with them in fp32.
        outer: the graph that this one is inside of, if any.
    """

    def __init__(
        self, name: str, opset: int, tensors: TensorFile, half: bool = False, outer: NestedBuilder | None = None
    ) -> None:
        super().__init__(name, opset, tensors, "")
        self.tensors = tensors
        self._half = half
        self._root: NestedBuilder = outer._root if outer else self
        self._count = 0
        self._casts: list[onnx.NodeProto] = []

    def weight(self, name: str, tensor: str) -> str:
        """Takes in a tensor of the weights' file, under its own name."""
        return self.matrix(tensor, lambda: self.tensors.array(tensor))

    def matrix(self, name: str, make: Callable[[], npt.NDArray[Any]]) -> str:
        """Takes in a weight that is made of the file's tensors, at its first use; fp16 is computed with in fp32."""
        root = self._root
        if name not in root._weights:
            value, stored = np.asarray(make(), order="C"), name
            if root._half and value.dtype == np.float32 and value.size >= SMALLEST_HALF:
                value = value.astype(np.float16)
            if value.dtype == np.float16:
                stored = f"{name}.fp16"
                root._casts.append(helper.make_node("Cast", [stored], [name], name=name, to=TensorProto.FLOAT))
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
        """Adds an operator and returns its outputs' names."""
        return super().ops(kind, *inputs, outputs=outputs, name=name or self._fresh(kind.lower()), **attributes)

    def inside(self, name: str) -> NestedBuilder:
        """A graph inside this one."""
        return NestedBuilder(name, self.opset, self.tensors, outer=self)

    def branch(
        self, condition: str, then: Callable[[NestedBuilder], str], other: Callable[[NestedBuilder], str], made: Made
    ) -> str:
        """Adds an `If`, each side of which makes one value."""
        sides = {}
        for side, make in (("then_branch", then), ("else_branch", other)):
            graph = self.inside(self._fresh(side))
            graph.returns([make(graph)], [made])
            sides[side] = graph.graph()
        return self.op("If", condition, **sides)

    def loop(self, count: str, body: Callable[[NestedBuilder, str], Sequence[str]], made: Sequence[Made]) -> list[str]:
        """Adds a `Loop` that runs `count` times.

        Args:
            count: how often, int64 [].
            body: is handed the graph and the number of the round, int64 []; makes a value for each of `made`.
            made: the types and shapes of a round's values. The loop stacks them, round after round.
        """
        graph = self.inside(self._fresh("body"))
        round_, go_on = self._fresh("round"), self._fresh("go_on")
        for name, dtype in ((round_, "int64"), (go_on, "bool")):
            graph.input(name, [], dtype)
        values = body(graph, round_)
        graph.returns([graph.op("Identity", go_on), *values], [("bool", []), *made])
        return self.ops("Loop", count, "", outputs=len(made), body=graph.graph())

    def returns(self, values: Sequence[str], made: Sequence[Made]) -> None:
        """Declares what a graph inside makes; a node passes on what it did not make itself."""
        own = {name for node in self._nodes for name in node.output}
        for value, (dtype, shape) in zip(values, made, strict=True):
            result = value if value in own else self.op("Identity", value)
            self._outputs.append(helper.make_tensor_value_info(result, TYPES[dtype], shape))

    def graph(self) -> onnx.GraphProto:
        """The finished graph; only the outermost holds weights."""
        nodes, weights = self._casts + self._nodes, list(self._weights.values())
        return helper.make_graph(nodes, self.name, self._inputs, self._outputs, initializer=weights)

    def model(self, metadata: Mapping[str, str], domains: Mapping[str, int]) -> onnx.ModelProto:
        """The finished model.

        Args:
            metadata: texts by name, which ONNX's APIs read.
            domains: versions of operators beside the standard ones.
        """
        opsets = [helper.make_opsetid(*domain) for domain in {"": self.opset, **domains}.items()]
        found = helper.make_model(
            self.graph(), opset_imports=opsets, producer_name=PRODUCER.decode(), ir_version=IR_VERSION
        )
        helper.set_model_props(found, dict(metadata))
        return found

    def _fresh(self, kind: str) -> str:
        """A name that nothing in the file has yet."""
        self._root._count += 1
        return f"{kind}_{self._root._count}"
