"""The graphs of one precision and their weights, read once and checked against the architecture."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np

from adavit.architecture import Architecture
from adavit.bundle.bundle import Bundle, GraphFiles
from adavit.bundle.head_weights import Arrays, Empty, Quantised, head_weights, quantised_head_weights
from adavit.bundle.keys import BOTH, STATE_BEHIND, STATE_BETWEEN, BlockKey, Sublayers
from adavit.bundle.onnx_format import Value
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.bundle.onnx_read import GraphReader
from adavit.bundle.shapes import Limits
from adavit.bundle.stored import StoredFile
from adavit.bundle.tensors import TensorFile
from adavit.errors import BundleError
from adavit.macs import dense_macs

__all__ = ["Graphs"]

DECIDING = ("norm1", "select")
"""Parts of the names of weights that decisions are made with."""
ROOM = {"numbers": "R", "attention_rows": "T", "attention_images": "A", "attention_tokens": "K", "mlp_rows": "U"}
"""What counts from 0 on in a block of a batch, and how far."""
STATES = ("state", STATE_BETWEEN, STATE_BEHIND, "next_state")
"""What holds the states of images, of which there are three."""
LIMITS = Value("limits", "float32", ("B", 3))
SMALL_VALUE, SMALL_COST = 1 << 20, 1 << 30
"""Elements of a value, and multiply-accumulates of a graph, that are never too many."""
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
        self._checked: set[Hashable] = set()

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
        return TensorFile.parse(self._bundle.map_stored(stored), f"{self.path}/{stored.file}")

    def stem(self) -> OnnxGraph:
        """images [1, 3, S, S] -> y [N, D] and, where the first block decides, decisions [1, M]."""
        if self.files.stem is None:
            raise BundleError(f"{self.path}: has no stem, since its model has no policies")
        arch = self.architecture
        inputs = (Value("images", "float32", (1, 3, arch.image_size, arch.image_size)),)
        return self._read(self.files.stem, inputs, self._outputs(-1, True))

    def block(self, block: int, sublayers: Sublayers) -> OnnxGraph:
        """A block that runs these sub-layers; see `adavit.graphs.block` for what it takes and makes."""
        arch = self.architecture
        inputs = [Value("x", "float32", (arch.tokens, arch.width))]
        if any(sublayers) and arch.token_policy:
            inputs.append(Value("tokens", "int64", ("K",)))
        inputs += self._weight_inputs(block, sublayers)
        return self._read(self.files.blocks[block][sublayers], inputs, self._outputs(block, any(sublayers)))

    def _weight_inputs(self, block: int, sublayers: Sublayers) -> list[Value]:
        """The weights that a block's graph is handed, of the types that they have in the file."""
        arch = self.architecture
        shapes: dict[str, tuple[int | str, ...]] = {
            "qkv": ("3c", arch.width),
            "qkv_bias": ("3c",),
            "proj": (arch.width, "c"),
            "heads": ("h",),
            "fc1": (arch.hidden, "c" if arch.adapts_heads(block) else arch.width),
            "fc2": (arch.width, arch.hidden),
        }
        stored = self.quantised_head_weights(BlockKey(block, sublayers, ()))
        return [
            Value(name, "float32" if isinstance(value, Quantised) else value.dtype.name, shapes[name])
            for name, value in stored.items()
        ]

    def dense(self) -> OnnxGraph:
        """The dense twin: images [B, 3, S, S] -> logits [B, C]."""
        arch = self.architecture
        if self.files.dense is None:
            raise BundleError(f"{self.path}: has no dense twin; export again, without `with_dense=False`")
        inputs = (Value("images", "float32", ("B", 3, arch.image_size, arch.image_size)),)
        return self._read(self.files.dense, inputs, (Value("logits", "float32", ("B", arch.classes)),))

    def batch_stem(self) -> OnnxGraph:
        """The stem of a batch; see `adavit.graphs.batch`."""
        arch = self.architecture
        inputs = Value("images", "float32", ("B", 3, arch.image_size, arch.image_size)), LIMITS
        outputs = Value("y", "float32", ("R", arch.width)), *self._for_block(0)
        return self._read(self._batch(0), inputs, outputs)

    def batch_block(self, block: int) -> OnnxGraph:
        """A block of a batch; see `adavit.graphs.batch` for what it takes and makes."""
        arch, last = self.architecture, block + 1 == self.architecture.depth
        inputs = [
            Value("x", "float32", ("R", arch.width)),
            Value("kept", "bool", ("B", self._policy_width)),
            Value("state", "int64", ("B",)),
            *(Value(name, "int64", (size,)) for name, size in ROOM.items()),
            *self._weight_inputs(block, BOTH),
        ]
        if not arch.adapts_heads(block):
            inputs.append(Value("heads", "int64", ("h",)))
        outputs = [Value("y", "float32", ("R", arch.width))]
        if last:
            outputs += [Value("logits", "float32", ("B", arch.classes)), Value("next_state", "int64", ("B",))]
        else:
            inputs.append(LIMITS)
            outputs += self._for_block(block + 1)
        return self._read(self._batch(block + 1), inputs, outputs)

    def _batch(self, position: int) -> StoredFile:
        if not self.files.batch:
            raise BundleError(f"{self.path}: has no graphs for batches, since its model has no policies")
        return self.files.batch[position]

    @property
    def _policy_width(self) -> int:
        return self.architecture.tokens + self.architecture.heads + 2

    def _for_block(self, block: int) -> list[Value]:
        """What a graph of a batch makes for the next block."""
        count = self.decisions(block)
        return [
            *([Value("next_decisions", "float32", ("B", count))] if count else []),
            Value("next_kept", "bool", ("B", self._policy_width)),
            Value("next_state", "int64", ("B",)),
            Value("next_sizes", "int64", (4,)),
        ]

    def head_weights(self, key: BlockKey, empty: Empty = np.empty) -> Arrays:
        """What a block's graph is handed for a key; int8 weights as float32."""
        return head_weights(self.architecture, self.tensors, key, empty)

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
        return arch.tokens * arch.token_policy + arch.policy_outputs(block) if block < arch.depth else 0

    def _outputs(self, block: int, changes: bool) -> tuple[Value, ...]:
        """What a graph makes that runs a block, or the stem (-1)."""
        arch = self.architecture
        found = [Value("y", "float32", (arch.tokens, arch.width))] * changes
        if block + 1 == arch.depth:
            found.append(Value("logits", "float32", (1, arch.classes)))
        elif count := self.decisions(block + 1):
            found.append(Value("decisions", "float32", (1, count)))
        return tuple(found)

    def _read(self, stored: StoredFile, inputs: Sequence[Value], outputs: Sequence[Value]) -> OnnxGraph:
        path = f"{self.path}/{stored.file}"
        found = self._reader.read(self._bundle.read_stored(stored), path)
        if found.outputs != tuple(outputs) or sorted(found.inputs, key=str) != sorted(inputs, key=str):
            raise BundleError(f"{path}: takes or makes other values than its architecture says; export again")
        self.check(found, path)
        return found

    def check(self, graph: OnnxGraph, path: str) -> None:
        """Checks that a graph's operators fit at all sizes, and that it makes what it declares.

        Args:
            graph: one of these, or a part of it.
            path: where it is, for messages.

        Raises:
            BundleError: it is not so.
        """
        try:
            self._check(graph)
        except ValueError as error:
            raise BundleError(f"{path}: is not a graph of its architecture: {error}; do not use this bundle") from None

    @cached_property
    def _reader(self) -> GraphReader:
        return GraphReader(self.tensors, PurePosixPath(self.files.weights.file).name, self.files.opset)

    def _check(self, graph: OnnxGraph) -> None:
        """Checks a graph's shapes at several sizes; ValueError where they do not fit.

        They are all tokens and heads, one of each, and sizes that all differ.
        """
        if (form := graph.form) in self._checked:
            return
        arch = self.architecture
        rows = {"tokens": arch.tokens, "heads": arch.heads} | dict.fromkeys(STATES, 3)
        most = arch.tokens
        for tokens, heads, batch, rows_attention, images, rows_mlp in (
            (most, arch.heads, 1, most, 1, most),
            (1, 1, 2, 1, 1, 1),
            ((most + 1) // 2, (arch.heads + 1) // 2, 4, most + 1, 2, most + 2),
        ):
            channels = heads * arch.head_width
            sizes = {"K": tokens, "h": heads, "c": channels, "3c": 3 * channels, "B": batch}
            sizes |= {"R": batch * most + 1, "T": rows_attention, "A": images, "U": rows_mlp}
            counts = {name: sizes[size] for name, size in ROOM.items()} | {"next_sizes": sizes["R"]}
            room = max(batch, 2)
            limits = Limits(room * arch.memory // 4 + SMALL_VALUE, room * 4 * dense_macs(arch) + SMALL_COST)
            graph.check(sizes, rows | counts, limits)
        self._checked.add(form)
