"""Which graph of a bundle is meant: its stem, its dense twin, or a block's graph for some sub-layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from adavit.bundle.bundle import GraphFiles
from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import Sublayers
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.bundle.stored import StoredFile
from adavit.errors import BundleError, shown

__all__ = ["DENSE_GRAPH", "STEM_GRAPH", "GraphKey", "graph_keys", "read_graph", "stored_graph"]


class GraphKey(NamedTuple):
    """A graph of a bundle.

    Attributes:
        role: "stem", "dense" or "block".
        block: a block's position; None elsewhere.
        sublayers: those that run of a block; None elsewhere.
    """

    role: str
    block: int | None = None
    sublayers: Sublayers | None = None

    @property
    def name(self) -> str:
        """For files, messages and reports."""
        return f"blocks.{self.block}.{self.sublayers.name}" if self.sublayers else self.role

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        block = {"block": self.block, **self.sublayers._asdict()} if self.sublayers else {}
        return {"role": self.role, **block}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GraphKey:
        """Reads what `to_dict` wrote; raises ValueError or KeyError where it is something else."""
        role = values["role"]
        if role in ("stem", "dense"):
            return cls(role)
        block, sublayers = values["block"], Sublayers(values["attention"], values["mlp"])
        if role != "block" or type(block) is not int or block < 0 or not all(type(runs) is bool for runs in sublayers):
            raise ValueError(f"an engine is of {shown(role)}, block {shown(block)}")
        return cls("block", block, sublayers)


STEM_GRAPH, DENSE_GRAPH = GraphKey("stem"), GraphKey("dense")


def graph_keys(files: GraphFiles) -> list[GraphKey]:
    """All graphs of a precision: stem, blocks, dense twin, as far as they are there."""
    blocks = [GraphKey("block", number, part) for number, block in enumerate(files.blocks) for part in block]
    return [STEM_GRAPH] * (files.stem is not None) + blocks + [DENSE_GRAPH] * (files.dense is not None)


def stored_graph(files: GraphFiles, key: GraphKey) -> StoredFile:
    """The file of a graph; raises BundleError where the precision has none."""
    found = files.stem if key == STEM_GRAPH else files.dense if key == DENSE_GRAPH else None
    if key.block is not None and key.block < len(files.blocks):
        found = files.blocks[key.block].get(key.sublayers) if key.sublayers else None
    if found is None:
        raise BundleError(f"the bundle has no graph {key.name} in {files.precision}; export again")
    return found


def read_graph(graphs: Graphs, key: GraphKey) -> OnnxGraph:
    """Reads a graph; raises BundleError where it is damaged or missing."""
    if key.block is not None and key.sublayers is not None:
        return graphs.block(key.block, key.sublayers)
    return graphs.stem() if key == STEM_GRAPH else graphs.dense()
