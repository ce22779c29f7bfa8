"""Which graph of a bundle a device runs: the stem or a block of a batch, a part of a block, or the dense twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from adavit.bundle.bundle import GraphFiles
from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Quantised
from adavit.bundle.keys import BETWEEN, BOTH, STATE_BEHIND, STATE_BETWEEN, BlockKey
from adavit.bundle.onnx_format import Value
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.bundle.stored import StoredFile
from adavit.errors import BundleError, shown

__all__ = [
    "DENSE_GRAPH",
    "PARTS",
    "STEM_GRAPH",
    "GraphKey",
    "constants_of",
    "graph_keys",
    "part_keys",
    "read_graph",
    "stored_graph",
]

Constants = Mapping[str, np.ndarray | Quantised]

PARTS = ("attention", "mlp", "decisions")
"""Of a block, in the order they run; behind the last block, "decisions" are the logits of the classes."""


class GraphKey(NamedTuple):
    """A graph that a device runs.

    Attributes:
        role: "stem", "block" or "dense".
        block: a block's position; None elsewhere.
        part: one of PARTS, where not the whole block is meant.
    """

    role: str
    block: int | None = None
    part: str | None = None

    @property
    def name(self) -> str:
        """For files, messages and reports."""
        if self.block is None:
            return self.role
        return f"blocks.{self.block}" + (f".{self.part}" if self.part else "")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GraphKey:
        """Reads what `to_dict` wrote; raises ValueError or KeyError where it is something else."""
        role = values["role"]
        if role in ("stem", "dense"):
            return cls(role)
        block, part = values["block"], values.get("part")
        if role != "block" or type(block) is not int or block < 0 or part not in (None, *PARTS):
            raise ValueError(f"an engine is of {shown(role)}, block {shown(block)}, part {shown(part)}")
        return cls("block", block, part)


STEM_GRAPH, DENSE_GRAPH = GraphKey("stem"), GraphKey("dense")


def graph_keys(files: GraphFiles) -> list[GraphKey]:
    """The whole graphs of a precision for devices: stem, blocks, dense twin, as far as they are there."""
    blocks = [GraphKey("block", number) for number in range(len(files.batch) - 1)]
    return [STEM_GRAPH] * bool(files.batch) + blocks + [DENSE_GRAPH] * (files.dense is not None)


def part_keys(files: GraphFiles) -> list[GraphKey]:
    """The parts of all blocks."""
    return [GraphKey("block", number, part) for number in range(len(files.batch) - 1) for part in PARTS]


def stored_graph(files: GraphFiles, key: GraphKey) -> StoredFile:
    """The file that a graph is in; raises BundleError where the precision has none."""
    position = 0 if key == STEM_GRAPH else None if key.block is None else key.block + 1
    found = files.dense if key == DENSE_GRAPH else None
    if position is not None and position < len(files.batch):
        found = files.batch[position]
    if found is None:
        raise BundleError(f"the bundle has no graph {key.name} in {files.precision}; export again")
    return found


def read_graph(graphs: Graphs, key: GraphKey) -> OnnxGraph:
    """Reads a graph; raises BundleError where it is damaged or missing."""
    stored = stored_graph(graphs.files, key)
    if key == STEM_GRAPH:
        return graphs.batch_stem()
    if key.block is None:
        return graphs.dense()
    whole = graphs.batch_block(key.block)
    if key.part is None:
        return whole
    part = _part(graphs, whole, key.part)
    graphs.check(part, f"{graphs.path}/{stored.file}")
    return part


def constants_of(graphs: Graphs, key: GraphKey, graph: OnnxGraph, heads: tuple[int, ...] | None = None) -> Constants:
    """The weights of a graph by name, for some heads of a block, by default for all."""
    found: dict[str, np.ndarray | Quantised] = dict(graph.arrays(graphs.tensors))
    if key.block is not None:
        chosen = tuple(range(graphs.architecture.heads)) if heads is None else heads
        weights = dict(graphs.quantised_head_weights(BlockKey(key.block, BOTH, chosen)))
        weights["heads"] = np.array(chosen, np.int64)
        inputs = {value.name for value in graph.inputs}
        found |= {name: value for name, value in weights.items() if name in inputs}
    return found


def _part(graphs: Graphs, whole: OnnxGraph, part: str) -> OnnxGraph:
    """Cuts a part from a block's graph."""
    y, behind = Value("y", "float32", ("R", graphs.architecture.width)), Value(STATE_BEHIND, "int64", ("B",))
    between = [Value(BETWEEN, *y[1:]), Value(STATE_BETWEEN, *behind[1:])]
    if part == "attention":
        return whole.cut(f"{whole.name}_attention", [], between)
    if part == "mlp":
        return whole.cut(f"{whole.name}_mlp", between, [y, behind])
    return whole.cut(f"{whole.name}_decisions", [y, behind], [value for value in whole.outputs if value != y])
