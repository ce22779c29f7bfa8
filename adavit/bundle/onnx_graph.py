"""A bundle's ONNX graph: checked, and written with weights as constants or as inputs.

A graph's file holds no weights: they are references into the weights' file beside it. What a backend is given is
written anew from what was read.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.bundle.head_weights import Quantised
from adavit.bundle.known import FAR, WHOLE, Known, whole
from adavit.bundle.onnx_format import IR_VERSION, PRODUCER, Node, Value, Weight
from adavit.bundle.onnx_write import codes_of, constant_field, new_node, tensor_field, value_field, values_of
from adavit.bundle.protobuf import bytes_field, number_field
from adavit.bundle.shapes import Limits, infer
from adavit.bundle.tensors import TensorFile
from adavit.errors import BundleError, shown

__all__ = ["OnnxGraph"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class OnnxGraph:
    """A graph as its file holds it.

    Attributes:
        name: the graph's own.
        opset: version of the standard operators.
        nodes: in the order they run.
        weights: constants by name.
        inputs, outputs: in order.
    """

    name: str
    opset: int
    nodes: tuple[Node, ...]
    weights: Mapping[str, Weight]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def check(self, sizes: Mapping[str, int], rows: Mapping[str, int], limits: Limits) -> None:
        """Checks that every operator fits its inputs, and that the outputs are what is declared.

        Args:
            sizes: of the dimensions that vary, by name.
            rows: below what the numbers are that an input or output holds, by its name.
            limits: what the graph may take.

        Raises:
            ValueError: it is not so.
        """

        def known(value: Value) -> Known:
            shape = tuple(sizes[size] if isinstance(size, str) else size for size in value.shape)
            bounds = (0, 1) if value.dtype == "bool" else (0, rows[value.name] - 1) if value.name in rows else None
            return Known(value.dtype, shape, None, bounds)

        made = {value.name: known(value) for value in self.inputs}
        made |= {name: _constant_value(name, weight) for name, weight in self.weights.items()}
        made = infer(self.nodes, made, limits)
        for value in self.outputs:
            wanted, found = known(value), made[value.name]
            if found[:2] != wanted[:2]:
                raise ValueError(f"its output {shown(value.name)} is {shown(found.shape)}")
            if wanted.bounds and not (found.bounds and 0 <= found.bounds[0] <= found.bounds[1] <= wanted.bounds[1]):
                raise ValueError(f"its output {shown(value.name)} may be beyond {wanted.bounds[1]}")

    @property
    def form(self) -> Hashable:
        """What `check` looks at: graphs of one form all pass it, or none does."""
        weights = ((name, *weight[:2], weight.tensor is None, weight.data) for name, weight in self.weights.items())
        return tuple(node.data for node in self.nodes), tuple(weights), self.inputs, self.outputs

    def arrays(self, tensors: TensorFile) -> dict[str, Array]:
        """The weights that lie in the weights' file, by their names in the graph."""
        return {name: tensors.array(weight.tensor) for name, weight in self.weights.items() if weight.tensor}

    def cut(self, name: str, given: Sequence[Value], outputs: Sequence[Value]) -> OnnxGraph:
        """The part that makes some of its values from others.

        Args:
            name: of the part.
            given: values inside that the part is given, beside the graph's own inputs.
            outputs: values inside that it makes.

        Raises:
            BundleError: the graph makes no such value.
        """
        wanted, known = {value.name for value in outputs}, {value.name for value in given}
        nodes: list[Node] = []
        if lacking := (wanted | known) - {name for node in self.nodes for name in node.outputs}:
            raise BundleError(f"graph {self.name} makes no {min(lacking)}; export again")
        for node in reversed(self.nodes):
            if not wanted.isdisjoint(node.outputs) and known.isdisjoint(node.outputs):
                nodes.append(node)
                wanted.update(node.inputs)
        made = {made for node in nodes for made in node.outputs}
        weights = {name: weight for name, weight in self.weights.items() if name in wanted}
        inputs = tuple(value for value in (*given, *self.inputs) if value.name in wanted and value.name not in made)
        return OnnxGraph(name, self.opset, tuple(reversed(nodes)), weights, inputs, tuple(outputs))

    def without(self, constants: Collection[str]) -> OnnxGraph:
        """The same graph; inputs of these names are not inputs any more, since what runs it holds them."""
        return replace(self, inputs=tuple(value for value in self.inputs if value.name not in constants))

    def _names(self) -> set[str]:
        """Of all values."""
        made = {name for node in self.nodes for name in node.outputs}
        return made | set(self.weights) | {value.name for value in self.inputs}

    def model(
        self,
        constants: Mapping[str, Array | Quantised],
        external: bool = False,
        nodes: Sequence[Node] | None = None,
        added: Mapping[str, Array] | None = None,
        domains: Mapping[str, int] | None = None,
    ) -> bytes:
        """A complete ONNX model: weights and inputs that `constants` names are constants, other weights are inputs.

        Args:
            constants: by name; int8 weights [out, in] are dequantised by an operator.
            external: leave the constants' values out, for a backend that is handed them beside the model: those of
                `values_of(constants)`.
            nodes: in the place of the graph's own.
            added: further constants that these nodes read, inside the model.
            domains: versions of further operator sets, by domain.

        Raises:
            BundleError: the graph has no such weight or input.
        """
        if unknown := set(constants) - set(self.weights) - {value.name for value in self.inputs}:
            raise BundleError(f"graph {self.name} takes no {', '.join(sorted(unknown))}; export again")
        given = [value for value in self.inputs if value.name not in constants]
        given += [
            Value(name, weight.dtype, weight.shape)
            for name, weight in self.weights.items()
            if weight.tensor and name not in constants
        ]
        quantised = [name for name, value in constants.items() if isinstance(value, Quantised)]
        if not {part for name in quantised for part in codes_of(name)}.isdisjoint(self._names()):
            raise BundleError(f"graph {self.name} uses names of int8 weights; export again")
        first = [new_node("DequantizeLinear", name, codes_of(name), [name], axis=0) for name in quantised]
        inside = ((name, weight) for name, weight in self.weights.items() if weight.tensor is None)
        graph = [bytes_field(1, node.data) for node in (*first, *(self.nodes if nodes is None else nodes))]
        graph.append(bytes_field(2, self.name.encode()))
        graph += [
            bytes_field(5, tensor_field(name, weight.dtype, weight.shape, weight.data)) for name, weight in inside
        ]
        graph += [bytes_field(5, constant_field(name, array, external)) for name, array in values_of(constants).items()]
        graph += [bytes_field(5, constant_field(name, array, False)) for name, array in (added or {}).items()]
        graph += [bytes_field(11, value_field(value)) for value in given]
        graph += [bytes_field(12, value_field(value)) for value in self.outputs]
        versions = {"": self.opset, **(domains or {})}
        opsets = (bytes_field(1, name.encode()) + number_field(2, version) for name, version in versions.items())
        return b"".join(
            [
                number_field(1, IR_VERSION),
                bytes_field(2, PRODUCER),
                bytes_field(7, b"".join(graph)),
                *(bytes_field(8, opset) for opset in opsets),
            ]
        )


def _constant_value(name: str, weight: Weight) -> Known:
    """What is known of a constant; of whole numbers inside the graph, all."""
    if weight.dtype not in WHOLE or weight.tensor:
        return Known(weight.dtype, weight.shape)
    if weight.dtype == "bool" and max(weight.data, default=0) > 1:
        raise ValueError(f"its constant {shown(name)} is neither true nor false")
    values = np.frombuffer(weight.data, np.dtype(weight.dtype).newbyteorder("<"))
    bounds = (int(values.min()), int(values.max())) if len(values) else None
    if bounds and not -FAR <= bounds[0] <= bounds[1] <= FAR:
        raise ValueError(f"its constant {shown(name)} holds numbers beyond {FAR}")
    return whole(weight.shape, bounds, values, weight.dtype)
