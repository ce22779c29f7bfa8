"""The graphs of one precision and their weights, read once and checked against the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np

from adavit.architecture import Architecture
from adavit.bundle.bundle import Bundle, GraphFiles, StoredFile
from adavit.bundle.head_weights import Arrays, Quantised, head_weights, quantised_head_weights
from adavit.bundle.keys import BlockKey, Sublayers
from adavit.bundle.onnx_graph import OnnxGraph, Value
from adavit.bundle.tensors import TensorFile
from adavit.errors import BundleError

__all__ = ["Graphs"]

DECIDING = ("norm1", "select")
"""Parts of the names of weights that decisions are made with."""
MOST_DECIDING = 1e15
"""The largest of these: tokens are below 1e17, and their products far from what float32 holds."""


class Graphs:
    """Reads the graphs of a precision; nothing is used of a file whose hash is not the one in `config.json`.

    Args:
        bundle: where they are.
        precision: one that the bundle has; by default its first.

    Raises:
        InputError: the bundle is not in this precision.
        BundleError: the weights are damaged.
    """

    def __init__(self, bundle: Bundle, precision: str | None = None) -> None:
        self.architecture: Architecture = bundle.architecture
        self.files: GraphFiles = bundle.files_of(precision)
        self.path = bundle.path
        self._bundle = bundle

    @property
    def precision(self) -> str:
        """Of these graphs."""
        return self.files.precision

    @property
    def bundle(self) -> Bundle:
        """Where they are."""
        return self._bundle

    @cached_property
    def tensors(self) -> TensorFile:
        """The weights, in memory as long as this object."""
        stored = self.files.weights
        return TensorFile.parse(self._bundle.read_stored(stored), f"{self.path}/{stored.file}")

    def stem(self) -> OnnxGraph:
        """images [1, 3, S, S] -> y [N, D] and, where the first block decides, decisions [1, M]."""
        if self.files.stem is None:
            raise BundleError(f"{self.path}: has no stem, since its model has no policies")
        arch = self.architecture
        inputs = (Value("images", "float32", (1, 3, arch.image_size, arch.image_size)),)
        return self._read(self.files.stem, inputs, self._behind(-1, True))

    def block(self, block: int, sublayers: Sublayers) -> OnnxGraph:
        """A block that runs these sub-layers; see `adavit.export.graphs.block` for what it takes and makes."""
        arch = self.architecture
        found = self._read(self.files.blocks[block][sublayers], None, self._behind(block, any(sublayers)))
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {"x": ("float32", (arch.tokens, arch.width))}
        if any(sublayers) and arch.token_policy:
            wanted["tokens"] = ("int64", (arch.tokens,))
        self._check_inputs(found, wanted | self._handed(block, sublayers))
        return found

    def _handed(self, block: int, sublayers: Sublayers) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Types and shapes of what a block's graph is handed for all heads."""
        arch, found = self.architecture, {}
        width, hidden = arch.width, arch.hidden

        def dtype(name: str) -> str:
            stored = self.tensors.tensors.get(f"blocks.{block}.{name}.weight")
            return "float16" if stored and stored.dtype == "float16" else "float32"

        if sublayers.attention:
            found["qkv"] = dtype("attn.query"), (3 * width, width)
            if arch.qkv_bias:
                found["qkv_bias"] = dtype("attn.query"), (3 * width,)
            found["proj"] = dtype("attn.proj"), (width, width)
        if sublayers.mlp:
            if arch.adapts_heads(block):
                found["heads"] = "int64", (arch.heads,)
            found["fc1"] = dtype("mlp.fc1"), (hidden, width)
            found["fc2"] = dtype("mlp.fc2"), (width, hidden)
        return found

    def dense(self) -> OnnxGraph:
        """The dense twin: images [B, 3, S, S] -> logits [B, C]."""
        arch = self.architecture
        if self.files.dense is None:
            raise BundleError(f"{self.path}: has no dense twin; export again, without --no-dense")
        inputs = (Value("images", "float32", ("B", 3, arch.image_size, arch.image_size)),)
        return self._read(self.files.dense, inputs, (Value("logits", "float32", ("B", arch.classes)),))

    def head_weights(self, key: BlockKey) -> Arrays:
        """What a block's graph is handed for a key; int8 weights as float32."""
        return head_weights(self.architecture, self.tensors, key)

    def quantised_head_weights(self, key: BlockKey) -> Mapping[str, np.ndarray | Quantised]:
        """What a block's graph is handed for a key; int8 weights as they are."""
        return quantised_head_weights(self.architecture, self.tensors, key)

    def check_deciding(self) -> None:
        """Checks the weights that decisions are made with: NaN would keep nothing.

        Raises:
            BundleError: some are not finite or beyond 1e15.
        """
        for name in self.tensors.tensors:
            if not any(part in name for part in DECIDING):
                continue
            value = self.tensors.array(name)
            if value.size and not -MOST_DECIDING <= value.min() <= value.max() <= MOST_DECIDING:  # NaN is both
                raise BundleError(
                    f"{self.path}: the weights {name} are NaN, infinite or beyond {MOST_DECIDING:.0e}; export again"
                )

    def decisions(self, block: int) -> int:
        """How many logits a block's decisions are made of: those of tokens, of heads and of sub-layers."""
        arch = self.architecture
        return arch.tokens * arch.token_policy + arch.choices(block) if block < arch.depth else 0

    def _behind(self, block: int, changes: bool) -> tuple[Value, ...]:
        """What a graph makes that runs a block, or the stem (-1)."""
        arch = self.architecture
        found = [Value("y", "float32", (arch.tokens, arch.width))] * changes
        if block + 1 == arch.depth:
            found.append(Value("logits", "float32", (1, arch.classes)))
        elif count := self.decisions(block + 1):
            found.append(Value("decisions", "float32", (1, count)))
        return tuple(found)

    def _read(
        self, stored: StoredFile, inputs: tuple[Value, ...] | None, outputs: tuple[Value, ...]
    ) -> OnnxGraph:
        path = f"{self.path}/{stored.file}"
        weights = PurePosixPath(self.files.weights.file)
        data = self._bundle.read_stored(stored)
        if PurePosixPath(stored.file).parent != weights.parent:
            raise BundleError(f"{path}: does not lie beside its weights; export again")
        found = OnnxGraph.parse(data, self.tensors, weights.name, path)
        if found.outputs != outputs or inputs not in (None, found.inputs):
            raise BundleError(f"{path}: takes or makes other values than its architecture says; export again")
        return found

    def _check_inputs(self, graph: OnnxGraph, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Raises BundleError unless a graph takes such values; a dimension that varies takes any."""
        found = {value.name: value for value in graph.inputs}
        fits = set(found) == set(wanted) and len(found) == len(graph.inputs)
        for name, (dtype, shape) in wanted.items() if fits else ():
            value = found[name]
            sizes = zip(value.shape, shape, strict=False)
            same = len(value.shape) == len(shape) and all(isinstance(a, str) or a == b for a, b in sizes)
            fits = fits and same and value.dtype == dtype
        if not fits:
            raise BundleError(f"{self.path}: graph {graph.name} takes other values than its architecture says; export again")
