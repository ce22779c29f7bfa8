"""What each operator of a graph makes of its inputs: the type and the shape, or an error where it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["MOST_DIMENSIONS", "RULES", "Known"]

Shape = tuple[int, ...]
FLOATS = ("float32", "float16")
MOST_DIMENSIONS = 8


class Known(NamedTuple):
    """What is known of a value.

    Attributes:
        dtype: numpy's name of its type.
        shape: its dimensions.
        values: its numbers, where they are whole and the same for every image.
        below: what all of its numbers are below, where they are at least 0 and number rows.
    """

    dtype: str
    shape: Shape
    values: tuple[int, ...] | None = None
    below: int | None = None


Attributes = Mapping[str, Any]
Rule = Callable[[list[Known], Attributes], Known | list[Known]]


def _need(*facts: bool) -> None:
    if not all(facts):
        raise ValueError


def _floats(given: Sequence[Known]) -> str:
    """The one type of float that values have."""
    dtype = given[0].dtype
    _need(dtype in FLOATS, all(value.dtype == dtype for value in given))
    return dtype


def _axis(attributes: Attributes, rank: int, default: int = 0) -> int:
    axis = attributes.get("axis", default)
    _need(-rank <= axis < rank)
    return int(axis) % rank


def _whole(value: Known) -> tuple[int, ...]:
    """The numbers of a vector of whole numbers."""
    _need(value.dtype == "int64", len(value.shape) == 1, value.values is not None)
    return value.values or ()


def _broadcast(*shapes: Shape) -> Shape:
    rank, found = max(map(len, shapes)), []
    for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        size = max(sizes)
        _need(all(other in (1, size) for other in sizes))
        found.append(size)
    return tuple(found)


def _elementwise(given: list[Known], attributes: Attributes) -> Known:
    first, second = given
    return Known(_floats(given), _broadcast(first.shape, second.shape))


def _unary(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    return Known(_floats(given), x.shape)


def _softmax(given: list[Known], attributes: Attributes) -> Known:
    _axis(attributes, len(given[0].shape), -1)
    return _unary(given, attributes)


def _cast(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    _floats(given)
    return Known({1: "float32", 10: "float16"}[attributes["to"]], x.shape)


def _concat(given: list[Known], attributes: Attributes) -> Known:
    shapes = [value.shape for value in given]
    axis = _axis(attributes, len(shapes[0]))
    rests = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    _need(len(rests) == 1, len({len(shape) for shape in shapes}) == 1)
    shape = (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])
    if given[0].dtype == "int64":
        return Known("int64", shape, tuple(number for value in given for number in _whole(value)))
    return Known(_floats(given), shape)


def _conv(given: list[Known], attributes: Attributes) -> Known:
    x, weight, *bias = given
    (batch, channels, *sides), (out, within, *kernel) = x.shape, weight.shape
    strides, pads = attributes["strides"], attributes.get("pads", (0, 0, 0, 0))
    _need(len(sides) == len(kernel) == len(strides) == 2, len(pads) == 4, within == channels)
    _need(tuple(attributes["kernel_shape"]) == tuple(kernel), min(strides) >= 1, min(pads) >= 0, len(bias) <= 1)
    _need(all(value.shape == (out,) for value in bias))
    padded = [side + pads[i] + pads[i + 2] - kernel[i] for i, side in enumerate(sides)]
    _need(min(padded) >= 0, all(pads[i] < kernel[i % 2] for i in range(4)))
    return Known(
        _floats(given), (batch, out, *(size // stride + 1 for size, stride in zip(padded, strides, strict=True)))
    )


def _scales(x: Known, scale: Known, zero: Known, attributes: Attributes) -> None:
    """Checks the scale and zero point of codes, which are one each, or one for each place of an axis."""
    _need(scale.dtype == "float32", zero.dtype == "int8", scale.shape == zero.shape)
    if scale.shape not in ((), (1,)):
        _need(scale.shape == (x.shape[_axis(attributes, len(x.shape), 1)],))


def _quantize(given: list[Known], attributes: Attributes) -> Known:
    x, scale, zero = given
    _scales(x, scale, zero, attributes)
    _need(x.dtype == "float32")
    return Known("int8", x.shape)


def _dequantize(given: list[Known], attributes: Attributes) -> Known:
    x, scale, zero = given
    _scales(x, scale, zero, attributes)
    _need(x.dtype == "int8")
    return Known("float32", x.shape)


def _expand(given: list[Known], attributes: Attributes) -> Known:
    x, shape = given
    sizes = _whole(shape)
    _need(min(sizes) >= 1)
    return Known(_floats([x]), _broadcast(x.shape, sizes))


def _gather(given: list[Known], attributes: Attributes) -> Known:
    x, rows = given
    axis = _axis(attributes, len(x.shape))
    _need(rows.dtype == "int64", rows.below is not None and rows.below <= x.shape[axis])
    return Known(_floats([x]), x.shape[:axis] + rows.shape + x.shape[axis + 1 :])


def _scatter(given: list[Known], attributes: Attributes) -> Known:
    x, rows, updates = given
    _need(rows.dtype == "int64", rows.below is not None and rows.below <= x.shape[0], rows.shape[1:] == (1,))
    _need(updates.shape == rows.shape[:1] + x.shape[1:])
    return Known(_floats([x, updates]), x.shape)


def _gemm(given: list[Known], attributes: Attributes) -> Known:
    a, b, *c = given
    (m, k), (first, second) = a.shape, b.shape
    inner, n = (second, first) if attributes.get("transB") else (first, second)
    _need(inner == k, len(c) <= 1, all(_broadcast(value.shape, (m, n)) == (m, n) for value in c))
    return Known(_floats(given), (m, n))


def _matmul(given: list[Known], attributes: Attributes) -> Known:
    a, b = given
    (*left, m, k), (*right, inner, n) = a.shape, b.shape
    _need(inner == k)
    return Known(_floats(given), (*_broadcast(tuple(left), tuple(right)), m, n))


def _layer_norm(given: list[Known], attributes: Attributes) -> Known:
    x, weight, bias = given
    _need(_axis(attributes, len(x.shape), -1) == len(x.shape) - 1, weight.shape == bias.shape == x.shape[-1:])
    return Known(_floats(given), x.shape)


def _reduce(given: list[Known], attributes: Attributes) -> Known:
    x, axes = given
    keeps, chosen = attributes.get("keepdims", 1), _whole(axes)
    _need(all(0 <= axis < len(x.shape) for axis in chosen), len(set(chosen)) == len(chosen) > 0)
    sizes = [(1 if i in chosen else size) for i, size in enumerate(x.shape) if keeps or i not in chosen]
    return Known(_floats([x]), tuple(sizes))


def _reshape(given: list[Known], attributes: Attributes) -> Known:
    x, wanted = given
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(_whole(wanted))]
    count, rest = math.prod(x.shape), math.prod(size for size in sizes if size != -1)
    _need(sizes.count(-1) <= 1, all(size >= -1 for size in sizes), rest > 0)
    shape = tuple(count // rest if size == -1 else size for size in sizes)
    _need(math.prod(shape) == count)
    return Known(_floats([x]), shape)


def _shape(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    start, end = attributes.get("start", 0), attributes.get("end", len(x.shape))
    _need(0 <= start < end <= len(x.shape))
    return Known("int64", (end - start,), x.shape[start:end])


def _slice(given: list[Known], attributes: Attributes) -> Known:
    x, *ends = given
    (start,), (end,), (axis,) = map(_whole, ends)
    _need(0 <= axis < len(x.shape) and 0 <= start < end <= x.shape[axis])
    return Known(_floats([x]), (*x.shape[:axis], end - start, *x.shape[axis + 1 :]))


def _split(given: list[Known], attributes: Attributes) -> list[Known]:
    x, sizes = given
    axis, parts, dtype = _axis(attributes, len(x.shape)), _whole(sizes), _floats([x])
    _need(min(parts) >= 1, sum(parts) == x.shape[axis])
    return [Known(dtype, (*x.shape[:axis], part, *x.shape[axis + 1 :])) for part in parts]


def _squeeze(given: list[Known], attributes: Attributes) -> Known:
    x, axes = given
    (axis,) = _whole(axes)
    _need(0 <= axis < len(x.shape) and x.shape[axis] == 1)
    return Known(_floats([x]), x.shape[:axis] + x.shape[axis + 1 :])


def _unsqueeze(given: list[Known], attributes: Attributes) -> Known:
    x, axes = given
    (axis,) = _whole(axes)
    _need(0 <= axis <= len(x.shape), x.dtype in (*FLOATS, "int64"))
    return x._replace(shape=(*x.shape[:axis], 1, *x.shape[axis:]))


def _transpose(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    perm = attributes["perm"]
    _need(sorted(perm) == list(range(len(x.shape))))
    return Known(_floats(given), tuple(x.shape[i] for i in perm))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _elementwise),
    **dict.fromkeys(("Erf", "Exp", "Gelu", "Sqrt"), _unary),
    "Cast": _cast,
    "Concat": _concat,
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "QuantizeLinear": _quantize,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "ScatterND": _scatter,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""What each operator makes of its inputs; ValueError where it cannot."""
