"""The stem as a graph: pixels [B, 3, S, S] to the first block's input [B, N, D].

The T2T stem is restructured exactly. Unfolding is strided slices laid side by side, in the order (row,
column, channel); the weights behind it are permuted from torch's (channel, row, column) to match. The
performer's factor 1/m cancels between numerator and denominator (where it scales the 1e-8), and its
output projection is applied to the 32 x 64 context instead of to every token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.export.graph import Graph
from adavit.export.weights import Weights
from adavit.macs import PERFORMER_FEATURES, PERFORMER_WIDTH

__all__ = ["add_stem"]


def add_stem(graph: Graph, arch: Architecture, weights: Weights, images: str) -> str:
    """Adds the stem to `graph` and returns the value [B, N, D]."""
    patches = (
        _tokens_to_token(graph, arch, weights, images) if arch.stem == "t2t" else _patches(graph, arch, weights, images)
    )
    position = weights["pos_embed"]
    first = weights["cls_token"] + position[:, :1]
    patches = graph.op("Add", patches, graph.weight("pos_embed", position[:, 1:]))
    # The class token is the same for every image: as many copies as there are images, by a shape of their own.
    batch = graph.op("Shape", images, start=0, end=1)
    rows = graph.op("Concat", batch, graph.ints(1, arch.width), axis=0)
    return graph.op("Concat", graph.op("Expand", graph.weight("cls_token", first), rows), patches, axis=1)


def _patches(graph: Graph, arch: Architecture, weights: Weights, images: str) -> str:
    side = arch.patch_size
    weight = graph.weight("patch_embed.weight", weights["patch_embed.proj.weight"])
    bias = graph.weight("patch_embed.bias", weights["patch_embed.proj.bias"])
    found = graph.op("Conv", images, weight, bias, kernel_shape=[side, side], strides=[side, side])
    return _tokens(graph, found, arch.width)


def _tokens(graph: Graph, feature_map: str, channels: int) -> str:
    """[B, C, h, w] -> [B, h * w, C]."""
    flat = graph.op("Reshape", feature_map, graph.ints(0, channels, -1))
    return graph.op("Transpose", flat, perm=[0, 2, 1])


def _tokens_to_token(graph: Graph, arch: Architecture, weights: Weights, images: str) -> str:
    width, side = PERFORMER_WIDTH, arch.image_size
    padded = graph.op("Pad", images, graph.ints(0, 0, 2, 2, 0, 0, 2, 2))
    found = graph.op("Concat", *_shifted(graph, padded, 7, 4, side // 4, axes=(2, 3)), axis=1)
    x = _performer(graph, weights, "attention1", _tokens(graph, found, 3 * 7 * 7), channels=3, kernel=7)
    x = graph.op("Reshape", x, graph.ints(0, side // 4, side // 4, width))
    padded = graph.op("Pad", x, graph.ints(0, 1, 1, 0, 0, 1, 1, 0))
    found = graph.op("Concat", *_shifted(graph, padded, 3, 2, side // 8, axes=(1, 2)), axis=3)
    x = graph.op("Reshape", found, graph.ints(0, -1, width * 3 * 3))
    x = _performer(graph, weights, "attention2", x, channels=width, kernel=3)
    # The last unfold feeds one linear layer, which makes the two of them a convolution.
    x = graph.op("Reshape", graph.op("Transpose", x, perm=[0, 2, 1]), graph.ints(0, width, side // 8, side // 8))
    kernel = weights["tokens_to_token.project.weight"].reshape(arch.width, width, 3, 3)
    bias = graph.weight("project.bias", weights["tokens_to_token.project.bias"])
    x = graph.op(
        "Conv", x, graph.weight("project.weight", kernel), bias, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
    )
    return _tokens(graph, x, arch.width)


def _shifted(graph: Graph, padded: str, kernel: int, stride: int, size: int, axes: tuple[int, int]) -> list[str]:
    """The kernel's positions, row by row: what each sees at every one of its size x size places."""
    reach = stride * (size - 1) + 1
    return [
        graph.op(
            "Slice",
            padded,
            graph.ints(row, column),
            graph.ints(row + reach, column + reach),
            graph.ints(*axes),
            graph.ints(stride, stride),
        )
        for row in range(kernel)
        for column in range(kernel)
    ]


def _performer(graph: Graph, weights: Weights, name: str, x: str, channels: int, kernel: int) -> str:
    """One performer layer [B, n, kernel^2 * channels] -> [B, n, 64]; see `adavit.model.stem.Performer`."""
    width, features = PERFORMER_WIDTH, PERFORMER_FEATURES
    part = weights.under(f"tokens_to_token.{name}")
    # torch's (channel, row, column) to (row, column, channel)
    order = np.arange(channels * kernel**2).reshape(channels, kernel**2).T.ravel()
    normed = _norm(graph, f"{name}.norm1", x, part["norm1.weight"][order], part["norm1.bias"][order])
    kqv = _linear(graph, f"{name}.kqv", normed, part["kqv.weight"][:, order], part["kqv.bias"])
    key, query, value = graph.ops("Split", kqv, graph.ints(width, width, width), outputs=3, axis=2)
    key, query = _features(graph, name, part, key), _features(graph, name, part, query)
    context = graph.op("MatMul", graph.op("Transpose", key, perm=[0, 2, 1]), value)
    context = graph.op("MatMul", context, graph.weight(f"{name}.proj.weight", part["proj.weight"].T))
    total = graph.op("Transpose", graph.op("ReduceSum", key, graph.ints(1), keepdims=1), perm=[0, 2, 1])
    both = graph.op("MatMul", query, graph.op("Concat", context, total, axis=2))
    numerator, denominator = graph.ops("Split", both, graph.ints(width, 1), outputs=2, axis=2)
    y = graph.op("Div", numerator, graph.op("Add", denominator, graph.scalar(1e-8 * features)))
    y = graph.op("Add", graph.op("Add", y, graph.weight(f"{name}.proj.bias", part["proj.bias"])), value)
    z = _norm(graph, f"{name}.norm2", y, part["norm2.weight"], part["norm2.bias"])
    z = graph.gelu(_linear(graph, f"{name}.mlp.0", z, part["mlp.0.weight"], part["mlp.0.bias"]))
    return graph.op("Add", _linear(graph, f"{name}.mlp.2", z, part["mlp.2.weight"], part["mlp.2.bias"]), y)


def _features(graph: Graph, name: str, part: Weights, u: str) -> str:
    """sqrt(m) phi(u) = exp(u w^T - |u|^2 / 2)."""
    linear = graph.op("MatMul", u, graph.weight(f"{name}.w", part["w"].T))
    half = graph.weight(f"{name}.half", np.full((PERFORMER_WIDTH, 1), 0.5, np.float32))
    return graph.op("Exp", graph.op("Sub", linear, graph.op("MatMul", graph.op("Mul", u, u), half)))


def _norm(graph: Graph, name: str, x: str, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]) -> str:
    return graph.layer_norm(x, graph.weight(f"{name}.weight", weight), graph.weight(f"{name}.bias", bias), 1e-5)


def _linear(graph: Graph, name: str, x: str, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]) -> str:
    product = graph.op("MatMul", x, graph.weight(f"{name}.weight", weight.T))
    return graph.op("Add", product, graph.weight(f"{name}.bias", bias))
