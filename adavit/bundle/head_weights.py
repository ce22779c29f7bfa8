"""The weights of kept heads, taken from a bundle's weights in the checkpoint's layouts.

A block's graph is handed the weights of the heads that it runs with: qkv [3c, D], queries before keys before values,
the attention scale in the queries'; qkv_bias [3c], proj [D, c], and the MLP's fc1 [hidden, c], fc2 [D, hidden] and the
heads' numbers, heads [h]. A key's bias adds the same to all scores of a query, which the softmax takes away again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.keys import BlockKey
from adavit.bundle.tensors import TensorFile
from adavit.errors import BundleError

PROJECTIONS = ("query", "key", "value")

__all__ = ["Arrays", "Empty", "Quantised", "head_weights", "quantised_head_weights"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Empty = Callable[[tuple[int, ...], Any], Array]
"""Makes an array of a shape and a type, as `numpy.empty` does."""


class Quantised(NamedTuple):
    """int8 weights [out, in], and a scale for each output channel, float32 [out]."""

    codes: Array
    scale: Array

    def dequantised(self, empty: Empty = np.empty) -> Array:
        """As float32."""
        return np.multiply(self.codes, self.scale[:, None], out=empty(self.codes.shape, np.float32))


def head_weights(arch: Architecture, tensors: TensorFile, key: BlockKey, empty: Empty = np.empty) -> Arrays:
    """What a block's graph is handed for a key, by the names of its inputs; int8 weights as float32.

    What all heads share is the file's own memory, read-only. What is cut for some heads is in arrays that `empty` made.

    Raises:
        BundleError: the file lacks a weight, or has it in another shape or type.
    """
    found = quantised_head_weights(arch, tensors, key, empty)
    return {name: value.dequantised(empty) if isinstance(value, Quantised) else value for name, value in found.items()}


def quantised_head_weights(
    arch: Architecture, tensors: TensorFile, key: BlockKey, empty: Empty = np.empty
) -> Mapping[str, Array | Quantised]:
    """As `head_weights`, with int8 weights as they are."""
    found: dict[str, Array | Quantised] = {}
    heads = np.array(key.heads, np.int64)
    channels = (heads[:, None] * arch.head_width + np.arange(arch.head_width)).ravel()
    width, hidden, block = arch.width, arch.hidden, f"blocks.{key.block}"

    def linear(name: str, shape: tuple[int, int]) -> Array | Quantised:
        weight = _tensor(tensors, f"{block}.{name}.weight", shape, "float32", "float16", "int8")
        if weight.dtype != np.int8:
            return weight
        return Quantised(weight, _tensor(tensors, f"{block}.{name}.weight.scale", shape[:1], "float32"))

    if key.sublayers.attention:
        parts = [linear(f"attn.{part}", (width, width)) for part in PROJECTIONS]
        if len({_matrix(part).dtype for part in parts}) > 1:
            raise BundleError(f"the weights of queries, keys and values of {block} have different types; export again")
        scale = arch.head_width**-0.5
        found["qkv"] = _joined_rows(parts, channels, heads, arch.head_width, scale, empty)
        if arch.qkv_bias:
            dtype = "float16" if _matrix(parts[0]).dtype == np.float16 else "float32"
            query, value = (
                _tensor(tensors, f"{block}.attn.{part}.bias", (width,), dtype) for part in ("query", "value")
            )
            own = query[channels]
            found["qkv_bias"] = np.concatenate([own * own.dtype.type(scale), np.zeros_like(own), value[channels]])
        found["proj"] = _columns(linear("attn.proj", (width, width)), heads, arch.head_width, empty)
    if key.sublayers.mlp:
        if arch.adapts_heads(key.block):
            found["heads"] = heads
        found["fc1"] = _columns(linear("mlp.fc1", (hidden, width)), heads, arch.head_width, empty)
        found["fc2"] = linear("mlp.fc2", (width, hidden))
    return found


def _tensor(tensors: TensorFile, name: str, shape: tuple[int, ...], *dtypes: str) -> Array:
    value = tensors.array(name)
    if value.shape != shape or value.dtype.name not in dtypes:
        raise BundleError(
            f"the weights {name} are {value.dtype.name} {list(value.shape)}, not {' or '.join(dtypes)} {list(shape)}; "
            "export again"
        )
    return value


def _matrix(weight: Array | Quantised) -> Array:
    return weight.codes if isinstance(weight, Quantised) else weight


def _joined_rows(
    parts: Sequence[Array | Quantised], channels: Array, heads: Array, width: int, scale: float, empty: Empty
) -> Array | Quantised:
    """The rows of output channels of queries, keys and values, below one another; the queries' scaled."""
    rows = _taken([_matrix(part) for part in parts], heads, width, empty)
    scales = [part.scale[channels] for part in parts if isinstance(part, Quantised)]
    if scales:
        return Quantised(rows, np.concatenate([scales[0] * np.float32(scale), *scales[1:]]))
    rows[: len(channels)] *= rows.dtype.type(scale)
    return rows


def _taken(parts: Sequence[Array], heads: Array, width: int, empty: Empty) -> Array:
    """The rows of the same heads of several matrices, below one another."""
    inputs = parts[0].shape[1]
    joined = empty((len(parts), len(heads), width, inputs), parts[0].dtype)
    for part, rows in zip(parts, joined, strict=True):
        part.reshape(-1, width, inputs).take(heads, 0, out=rows, mode="clip")
    return joined.reshape(len(parts) * len(heads) * width, inputs)


def _columns(weight: Array | Quantised, heads: Array, width: int, empty: Empty) -> Array | Quantised:
    """The columns of heads, which are input channels."""
    matrix = _matrix(weight)
    if len(heads) * width == matrix.shape[1]:
        return weight
    by_head = matrix.reshape(len(matrix), -1, width)  # whole heads are copied, not single values
    columns = empty((len(matrix), len(heads), width), matrix.dtype)
    by_head.take(heads, 1, out=columns, mode="clip")
    columns = columns.reshape(len(matrix), len(heads) * width)
    return Quantised(columns, weight.scale) if isinstance(weight, Quantised) else columns
