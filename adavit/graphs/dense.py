"""The dense twin as a graph: every policy on, images [B, 3, S, S] -> logits [B, C].

Linear layers run on the tokens of all images as rows, [B * N, D], attention's products by image.
"""

from __future__ import annotations

import numpy as np

from adavit.architecture import Architecture
from adavit.graphs.block import add_head, add_mlp, add_norm, add_update
from adavit.graphs.builder import Builder
from adavit.graphs.precision import Precision, Units
from adavit.graphs.stem import add_stem

__all__ = ["make_dense"]


def make_dense(graph: Builder, arch: Architecture, units: Units) -> None:
    """Makes a graph the dense twin, whose sub-layers have the same precisions as those of the blocks."""
    images = graph.input("images", ["B", 3, arch.image_size, arch.image_size])
    rows = graph.op("Reshape", add_stem(graph, arch, images), graph.ints(-1, arch.width))
    for block in range(arch.depth):
        attention, mlp = units.of_dense(block)
        rows = _attention(graph, arch, block, rows, attention)
        weights = {name: _matrix(graph, mlp, f"blocks.{block}.mlp.{name}.weight") for name in ("fc1", "fc2")}
        rows = add_mlp(graph, arch, block, rows, weights, mlp, prefix=f"blocks.{block}.")
    tokens = graph.op("Reshape", rows, graph.ints(-1, arch.tokens, arch.width))
    graph.op("Gather", tokens, graph.constant("first", np.int64(0)), axis=1, name="classes")
    add_head(graph, arch, "classes", "B")


def _matrix(graph: Builder, precision: Precision, tensor: str) -> str:
    """The weights of a linear layer, dequantised where they are int8."""
    weight = graph.weight(tensor, tensor)
    if precision.name != "int8":
        return weight
    scale, zero = (graph.weight(f"{tensor}.{part}", f"{tensor}.{part}") for part in ("scale", "zero"))
    return graph.op("DequantizeLinear", weight, scale, zero, axis=0)


def _attention(graph: Builder, arch: Architecture, block: int, x: str, precision: Precision) -> str:
    """Attention with every head, on rows of all images: [B * N, D] -> [B * N, D]."""
    site = f"blocks.{block}"
    normed = add_norm(graph, arch, x, f"{site}.norm1", f"{site}.norm1", f"{site}.qkv.input")
    shape = graph.ints(-1, arch.tokens, arch.heads, arch.head_width)

    def by_head(name: str, perm: list[int]) -> str:
        rows = _projected(graph, arch, site, name, normed, precision)
        return graph.op("Transpose", graph.op("Reshape", rows, shape), perm=perm)

    query, key, value = by_head("query", [0, 2, 1, 3]), by_head("key", [0, 2, 3, 1]), by_head("value", [0, 2, 1, 3])
    scores = precision.leave(graph, graph.op("MatMul", query, key))
    shares = precision.enter(graph, graph.op("Softmax", scores, axis=-1))
    mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])
    mixed = graph.op("Reshape", mixed, graph.ints(-1, arch.width), name=f"{site}.mixed")
    weight = _matrix(graph, precision, f"{site}.attn.proj.weight")
    return add_update(graph, block, "attn", "proj", mixed, weight, x, precision, f"{site}.")


def _projected(graph: Builder, arch: Architecture, site: str, name: str, normed: str, precision: Precision) -> str:
    """Queries, keys or values of normed rows; queries scaled. A key's bias adds the same to all scores of a query."""
    tensor = f"{site}.attn.{name}"
    # Each in int8 of its own: ONNX Runtime multiplies slowly what several products read.
    read = precision.enter(graph, normed, f"{site}.qkv", f"{site}.")
    found = graph.op("Gemm", read, _matrix(graph, precision, f"{tensor}.weight"), transB=1)
    if arch.qkv_bias and name != "key":
        found = graph.op("Add", found, graph.weight(f"{tensor}.bias", f"{tensor}.bias"))
    elif precision.name == "int8":
        # OpenVINO 2026.4 refuses to split the rows of an int8 product that nothing was added to; this changes nothing.
        found = graph.op("Add", found, graph.scalar(1e-30))
    if name == "query":
        scale = np.asarray(arch.head_width**-0.5, precision.dtype)
        found = graph.op("Mul", found, graph.constant(f"attention_scale_{precision.dtype}", scale))
    return found
