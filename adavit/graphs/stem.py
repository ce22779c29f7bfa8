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

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.bundle.tensors import DERIVED
from adavit.graphs.block import add_decisions
from adavit.graphs.builder import Builder
from adavit.macs import PERFORMER_FEATURES, PERFORMER_WIDTH

__all__ = ["add_stem", "make_stem", "stem_tensors"]

Float = npt.NDArray[np.float32]
Weights = Mapping[str, npt.NDArray[np.float32]]

UNFOLDED = 3 * 7 * 7
"""Values that the first unfold sees at a place."""


def make_stem(graph: Builder, arch: Architecture) -> None:
    """Makes a graph the stem's: images [1, 3, S, S] -> y [N, D] and the first block's decisions [1, M]."""
    images = graph.input("images", [1, 3, arch.image_size, arch.image_size])
    graph.output("y", graph.op("Squeeze", add_stem(graph, arch, images), graph.ints(0)), [arch.tokens, arch.width])
    add_decisions(graph, arch, 0, "y")


def add_stem(graph: Builder, arch: Architecture, images: str) -> str:
    """Adds the stem to `graph` and returns the value [B, N, D]."""
    patches = _tokens_to_token(graph, arch, images) if arch.stem == "t2t" else _patches(graph, arch, images)
    # The class token is the same for every image: as many copies as there are images, by a shape of their own.
    batch = graph.op("Shape", images, start=0, end=1)
    rows = graph.op("Concat", batch, graph.ints(1, arch.width), axis=0)
    first = graph.op("Expand", graph.weight("cls_token", "cls_token"), rows)
    return graph.op("Add", graph.op("Concat", first, patches, axis=1), graph.weight("pos_embed", "pos_embed"))


def stem_tensors(arch: Architecture, weights: Weights) -> dict[str, Float]:
    """The tensors of a T2T stem that are made of the checkpoint's, by their names in the weights' file."""
    if arch.stem != "t2t":
        return {}
    found: dict[str, Float] = {"unfold": np.eye(UNFOLDED, dtype=np.float32).reshape(UNFOLDED, 3, 7, 7)}
    for number in (1, 2):
        name, prefix = f"attention{number}", f"tokens_to_token.attention{number}."
        weight, bias = _with_norm_folded(weights, prefix, "norm1", "kqv")
        weight = _centred(weight)  # what rounding left of the mean is taken away
        found[f"{name}.kqv.weight"] = weight.reshape(-1, PERFORMER_WIDTH, 3, 3) if number == 2 else weight
        found[f"{name}.kqv.bias"] = bias
        found[f"{name}.proj.bias"] = weights[f"{prefix}proj.bias"][:, None]
        found[f"{name}.mlp.0.weight"], found[f"{name}.mlp.0.bias"] = _with_norm_folded(
            weights, prefix, "norm2", "mlp.0"
        )
        found[f"{name}.mlp.2.bias"] = weights[f"{prefix}mlp.2.bias"][:, None]
    return {DERIVED + name: np.ascontiguousarray(value) for name, value in found.items()}


def _derived(graph: Builder, name: str) -> str:
    return graph.weight(name, DERIVED + name)


def _patches(graph: Builder, arch: Architecture, images: str) -> str:
    side = arch.patch_size
    weight, bias = (graph.weight(f"patch_embed.{kind}", f"patch_embed.proj.{kind}") for kind in ("weight", "bias"))
    found = graph.op("Conv", images, weight, bias, kernel_shape=[side, side], strides=[side, side])
    return _tokens(graph, found, arch.width)


def _tokens(graph: Builder, feature_map: str, channels: int) -> str:
    """[B, C, h, w] -> [B, h * w, C]."""
    flat = graph.op("Reshape", feature_map, graph.ints(0, channels, -1))
    return graph.op("Transpose", flat, perm=[0, 2, 1])


def _tokens_to_token(graph: Builder, arch: Architecture, images: str) -> str:
    width, side = PERFORMER_WIDTH, arch.image_size

    x = graph.op("Conv", images, _derived(graph, "unfold"), kernel_shape=[7, 7], strides=[4, 4], pads=[2] * 4)
    x = graph.op("Reshape", x, graph.ints(0, UNFOLDED, -1))
    x = graph.op("Sub", x, _mean(graph, x, UNFOLDED))
    x = graph.op("Div", x, _deviation(graph, _mean_square(graph, x, UNFOLDED)))
    kqv = graph.op("MatMul", _derived(graph, "attention1.kqv.weight"), x)
    x = _performer(graph, "attention1", graph.op("Add", kqv, _derived(graph, "attention1.kqv.bias")))

    picture = graph.op("Reshape", x, graph.ints(0, width, side // 4, side // 4))
    kqv = _convolved(graph, picture, _derived(graph, "attention2.kqv.weight"))
    deviation = _deviation(graph, _unfolded_variance(graph, x, side // 4))
    kqv = graph.op("Div", graph.op("Reshape", kqv, graph.ints(0, 3 * width, -1)), deviation)
    x = _performer(graph, "attention2", graph.op("Add", kqv, _derived(graph, "attention2.kqv.bias")))

    picture = graph.op("Reshape", x, graph.ints(0, width, side // 8, side // 8))
    project = graph.weight("project.weight", "tokens_to_token.project.weight")
    kernel = graph.op("Reshape", project, graph.ints(arch.width, width, 3, 3))
    x = _convolved(graph, picture, kernel, graph.weight("project.bias", "tokens_to_token.project.bias"))
    return _tokens(graph, x, arch.width)


def _convolved(graph: Builder, picture: str, weight: str, *bias: str) -> str:
    """A linear layer behind the unfold of 3 x 3 places, every second in both directions."""
    return graph.op("Conv", picture, weight, *bias, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)


def _unfolded_variance(graph: Builder, x: str, side: int) -> str:
    """The variance of what the second unfold sees of x [B, 64, side^2] at each place: [B, 1, (side / 2)^2].

    Of nine places and their channels, it is the mean variance within the places and the variance of their means. Both
    are sums of squares of differences, as exact as the variance of the unfolded values themselves.
    """
    mean = _mean(graph, x, PERFORMER_WIDTH)
    rest = graph.op("Sub", x, mean)
    within = _mean_square(graph, rest, PERFORMER_WIDTH)
    means, variances = (graph.op("Reshape", value, graph.ints(0, 1, side, side)) for value in (mean, within))
    between = _convolved(graph, means, graph.constant("places", _centred(np.eye(9)).reshape(9, 1, 3, 3)))
    between = graph.op("Reshape", between, graph.ints(0, 9, -1))
    pooled = _convolved(graph, variances, graph.constant("pool", np.full((1, 1, 3, 3), 1 / 9, np.float32)))
    return graph.op("Add", graph.op("Reshape", pooled, graph.ints(0, 1, -1)), _mean_square(graph, between, 9))


def _performer(graph: Builder, name: str, kqv: str) -> str:
    """The rest of a performer layer behind kqv [B, 192, n] -> [B, 64, n]; see `adavit.model.stem.Performer`."""
    width, features, own = PERFORMER_WIDTH, PERFORMER_FEATURES, f"tokens_to_token.{name}."
    key, query, value = graph.ops("Split", kqv, graph.ints(width, width, width), outputs=3, axis=1)
    key, query = _features(graph, name, key), _features(graph, name, query)
    context = graph.op("MatMul", value, graph.op("Transpose", key, perm=[0, 2, 1]))
    context = graph.op("MatMul", graph.weight(f"{name}.proj.weight", f"{own}proj.weight"), context)
    total = graph.op("Transpose", graph.op("ReduceSum", key, graph.ints(2), keepdims=1), perm=[0, 2, 1])
    denominator = graph.op("Add", graph.op("MatMul", total, query), graph.scalar(1e-8 * features))
    y = graph.op("Div", graph.op("MatMul", context, query), denominator)
    y = graph.op("Add", graph.op("Add", y, _derived(graph, f"{name}.proj.bias")), value)

    rest = graph.op("Sub", y, _mean(graph, y, width))
    deviation = _deviation(graph, _mean_square(graph, rest, width))
    z = graph.op("MatMul", _derived(graph, f"{name}.mlp.0.weight"), graph.op("Div", rest, deviation))
    z = graph.gelu(graph.op("Add", z, _derived(graph, f"{name}.mlp.0.bias")))
    z = graph.op("MatMul", graph.weight(f"{name}.mlp.2.weight", f"{own}mlp.2.weight"), z)
    z = graph.op("Add", z, _derived(graph, f"{name}.mlp.2.bias"))
    return graph.op("Add", z, y)


def _centred(weight: npt.NDArray[Any]) -> Float:
    """The weights of a linear layer [out, in] whose input has its mean taken away first."""
    exact = weight.astype(np.float64)
    centred: Float = (exact - exact.mean(1, keepdims=True)).astype(np.float32)
    return centred


def _mean(graph: Builder, x: str, channels: int) -> str:
    """The mean over the channels of [B, C, n], as a product: backends reduce this dimension slowly."""
    row = graph.constant(f"mean_{channels}", np.full((1, channels), 1 / channels, np.float32))
    return graph.op("MatMul", row, x)


def _mean_square(graph: Builder, x: str, channels: int) -> str:
    """The mean over the channels of the squares of [B, C, n]: a variance, where x has its mean taken away."""
    return _mean(graph, graph.op("Mul", x, x), channels)


def _deviation(graph: Builder, variance: str) -> str:
    """What layer normalisation divides by."""
    return graph.op("Sqrt", graph.op("Add", variance, graph.scalar(1e-5)))


def _with_norm_folded(weights: Weights, prefix: str, norm: str, linear: str) -> tuple[Float, Float]:
    """Weights [out, in] and bias [out, 1] of a linear layer with the scale and bias of the normalisation before it."""
    weight = weights[f"{prefix}{linear}.weight"].astype(np.float64)
    bias = weight @ weights[f"{prefix}{norm}.bias"] + weights[f"{prefix}{linear}.bias"]
    scaled: Float = (weight * weights[f"{prefix}{norm}.weight"]).astype(np.float32)
    return scaled, bias[:, None].astype(np.float32)


def _features(graph: Builder, name: str, u: str) -> str:
    """sqrt(m) phi(u) = exp(w u - |u|^2 / 2), of u [B, 64, n]."""
    linear = graph.op("MatMul", graph.weight(f"{name}.w", f"tokens_to_token.{name}.w"), u)
    half = graph.constant(f"{name}.half", np.full((1, PERFORMER_WIDTH), 0.5, np.float32))
    return graph.op("Exp", graph.op("Sub", linear, graph.op("MatMul", half, graph.op("Mul", u, u))))
