"""The stem as a graph: pixels [B, 3, S, S] to the first block's input [B, N, D].

The T2T stem is restructured exactly, and stays in the layout of pictures, [B, channels, places], so that nothing is
transposed. Every linear layer behind an unfold is a convolution. Layer normalisation divides by a deviation that is the
same for all channels of a place, so that it may do so behind the linear layer; taking the mean away is part of the
weights. What the second unfold's variance is made of, see `_unfolded_variance`. The first unfold, of pixels, is made,
by a convolution that copies, and has its mean taken away before any weight meets it: of a patch of one colour nothing
but rounding is left then, which is divided by a deviation of 0.003. The performer's factor 1/m cancels between
numerator and denominator (where it scales the 1e-8), and its output projection is applied to the 64 x 32 context
instead of to every token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.export.graph import Graph
from adavit.export.weights import Weights
from adavit.macs import PERFORMER_FEATURES, PERFORMER_WIDTH

__all__ = ["add_stem"]

Float = npt.NDArray[np.float32]

UNFOLDED = 3 * 7 * 7
"""Values that the first unfold sees at a place."""


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
    first, second = (weights.under(f"tokens_to_token.attention{i}") for i in (1, 2))

    unfold = graph.weight("unfold", np.eye(UNFOLDED, dtype=np.float32).reshape(UNFOLDED, 3, 7, 7))
    x = graph.op("Conv", images, unfold, kernel_shape=[7, 7], strides=[4, 4], pads=[2] * 4)
    x = graph.op("Reshape", x, graph.ints(0, UNFOLDED, -1))
    x = graph.op("Sub", x, _mean(graph, x, UNFOLDED))
    x = graph.op("Div", x, _deviation(graph, _mean_square(graph, x, UNFOLDED)))
    weight, bias = _behind_norm(first, "norm1", "kqv")
    # Centred weights take away what rounding left of the mean.
    kqv = graph.op("MatMul", graph.weight("attention1.kqv.weight", _centred(weight)), x)
    x = _performer(graph, first, "attention1", graph.op("Add", kqv, graph.weight("attention1.kqv.bias", bias)))

    weight, bias = _behind_norm(second, "norm1", "kqv")
    kernel = _centred(weight).reshape(3 * width, width, 3, 3)
    picture = graph.op("Reshape", x, graph.ints(0, width, side // 4, side // 4))
    kqv = _convolved(graph, picture, "attention2.kqv.weight", kernel)
    deviation = _deviation(graph, _unfolded_variance(graph, x, side // 4))
    kqv = graph.op("Div", graph.op("Reshape", kqv, graph.ints(0, 3 * width, -1)), deviation)
    x = _performer(graph, second, "attention2", graph.op("Add", kqv, graph.weight("attention2.kqv.bias", bias)))

    picture = graph.op("Reshape", x, graph.ints(0, width, side // 8, side // 8))
    kernel = weights["tokens_to_token.project.weight"].reshape(arch.width, width, 3, 3)
    bias = weights["tokens_to_token.project.bias"]
    x = _convolved(graph, picture, "project.weight", kernel, graph.weight("project.bias", bias))
    return _tokens(graph, x, arch.width)


def _convolved(graph: Graph, picture: str, name: str, kernel: Float, *bias: str) -> str:
    """A linear layer behind the unfold of 3 x 3 places, every second in both directions."""
    weight = graph.weight(name, kernel)
    return graph.op("Conv", picture, weight, *bias, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)


def _unfolded_variance(graph: Graph, x: str, side: int) -> str:
    """The variance of what the second unfold sees of x [B, 64, side^2] at each place: [B, 1, (side / 2)^2].

    Of nine places and their channels, it is the mean variance within the places and the variance of their means. Both
    are sums of squares of differences, as exact as the variance of the unfolded values themselves.
    """
    mean = _mean(graph, x, PERFORMER_WIDTH)
    rest = graph.op("Sub", x, mean)
    within = _mean_square(graph, rest, PERFORMER_WIDTH)
    means, variances = (graph.op("Reshape", value, graph.ints(0, 1, side, side)) for value in (mean, within))
    between = _convolved(graph, means, "places", _centred(np.eye(9)).reshape(9, 1, 3, 3))
    between = graph.op("Reshape", between, graph.ints(0, 9, -1))
    pooled = _convolved(graph, variances, "pool", np.full((1, 1, 3, 3), 1 / 9, np.float32))
    return graph.op("Add", graph.op("Reshape", pooled, graph.ints(0, 1, -1)), _mean_square(graph, between, 9))


def _performer(graph: Graph, part: Weights, name: str, kqv: str) -> str:
    """The rest of a performer layer behind kqv [B, 192, n] -> [B, 64, n]; see `adavit.model.stem.Performer`."""
    width, features = PERFORMER_WIDTH, PERFORMER_FEATURES
    key, query, value = graph.ops("Split", kqv, graph.ints(width, width, width), outputs=3, axis=1)
    key, query = _features(graph, name, part, key), _features(graph, name, part, query)
    context = graph.op("MatMul", value, graph.op("Transpose", key, perm=[0, 2, 1]))
    context = graph.op("MatMul", graph.weight(f"{name}.proj.weight", part["proj.weight"]), context)
    total = graph.op("Transpose", graph.op("ReduceSum", key, graph.ints(2), keepdims=1), perm=[0, 2, 1])
    denominator = graph.op("Add", graph.op("MatMul", total, query), graph.scalar(1e-8 * features))
    y = graph.op("Div", graph.op("MatMul", context, query), denominator)
    y = graph.op("Add", graph.op("Add", y, graph.weight(f"{name}.proj.bias", part["proj.bias"][:, None])), value)

    rest = graph.op("Sub", y, _mean(graph, y, width))
    deviation = _deviation(graph, _mean_square(graph, rest, width))
    weight, bias = _behind_norm(part, "norm2", "mlp.0")
    z = graph.op("MatMul", graph.weight(f"{name}.mlp.0.weight", weight), graph.op("Div", rest, deviation))
    z = graph.gelu(graph.op("Add", z, graph.weight(f"{name}.mlp.0.bias", bias)))
    z = graph.op("MatMul", graph.weight(f"{name}.mlp.2.weight", part["mlp.2.weight"]), z)
    z = graph.op("Add", z, graph.weight(f"{name}.mlp.2.bias", part["mlp.2.bias"][:, None]))
    return graph.op("Add", z, y)


def _centred(weight: npt.NDArray[Any]) -> Float:
    """The weights of a linear layer [out, in] whose input has its mean taken away first."""
    exact = weight.astype(np.float64)
    centred: Float = (exact - exact.mean(1, keepdims=True)).astype(np.float32)
    return centred


def _mean(graph: Graph, x: str, channels: int) -> str:
    """The mean over the channels of [B, C, n], as a product: backends reduce this dimension slowly."""
    row = graph.weight(f"mean_{channels}", np.full((1, channels), 1 / channels, np.float32))
    return graph.op("MatMul", row, x)


def _mean_square(graph: Graph, x: str, channels: int) -> str:
    """The mean over the channels of the squares of [B, C, n]: a variance, where x has its mean taken away."""
    return _mean(graph, graph.op("Mul", x, x), channels)


def _deviation(graph: Graph, variance: str) -> str:
    """What layer normalisation divides by."""
    return graph.op("Sqrt", graph.op("Add", variance, graph.scalar(1e-5)))


def _behind_norm(part: Weights, norm: str, linear: str) -> tuple[Float, Float]:
    """Weights [out, in] and bias [out, 1] of a linear layer with the scale and bias of the normalisation before it."""
    weight = part[f"{linear}.weight"].astype(np.float64)
    bias = weight @ part[f"{norm}.bias"] + part[f"{linear}.bias"]
    scaled: Float = (weight * part[f"{norm}.weight"]).astype(np.float32)
    return scaled, bias[:, None].astype(np.float32)


def _features(graph: Graph, name: str, part: Weights, u: str) -> str:
    """sqrt(m) phi(u) = exp(w u - |u|^2 / 2), of u [B, 64, n]."""
    linear = graph.op("MatMul", graph.weight(f"{name}.w", part["w"]), u)
    half = graph.weight(f"{name}.half", np.full((1, PERFORMER_WIDTH), 0.5, np.float32))
    return graph.op("Exp", graph.op("Sub", linear, graph.op("MatMul", half, graph.op("Mul", u, u))))
