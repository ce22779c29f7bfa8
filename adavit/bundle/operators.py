"""What each operator of a graph makes of its inputs: the type and the shape, or an error where it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adavit.bundle.elementwise import ELEMENTWISE
from adavit.bundle.known import (
    FLOATS,
    WHOLE,
    Attributes,
    Known,
    Rule,
    axis_of,
    bounds_of,
    broadcast,
    floats,
    need,
    same_type,
    whole,
    whole_vector,
)

__all__ = ["RULES"]


def _cumulated(given: list[Known], attributes: Attributes) -> Known:
    """Sums of what comes before along the only axis."""
    x, axis = given
    need(x.dtype == "int64", len(x.shape) == 1, axis.values == (0,), axis.shape == ())
    ((low, high),) = bounds_of(x)
    need(low >= 0, attributes.get("exclusive") in (None, 0, 1))
    return whole(x.shape, (0, high * (x.shape[0] - attributes.get("exclusive", 0))))


def _concat(given: list[Known], attributes: Attributes) -> Known:
    shapes = [value.shape for value in given]
    axis = axis_of(attributes, len(shapes[0]))
    rests = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    need(len(rests) == 1, len({len(shape) for shape in shapes}) == 1)
    shape = (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])
    if given[0].dtype not in WHOLE:
        return Known(floats(given), shape)
    bounds = bounds_of(*given)
    found = min(low for low, _ in bounds), max(high for _, high in bounds)
    flat = len(shape) == 1 and all(value.values is not None for value in given)
    values = [number for value in given for number in value.values or ()] if flat else None
    return whole(shape, found, values, same_type(given))


def _conv(given: list[Known], attributes: Attributes) -> Known:
    x, weight, *bias = given
    (batch, channels, *sides), (out, within, *kernel) = x.shape, weight.shape
    strides, pads = attributes["strides"], attributes.get("pads", (0, 0, 0, 0))
    need(len(sides) == len(kernel) == len(strides) == 2, len(pads) == 4, within == channels)
    need(tuple(attributes["kernel_shape"]) == tuple(kernel), min(strides) >= 1, min(pads) >= 0, len(bias) <= 1)
    need(all(value.shape == (out,) for value in bias))
    padded = [side + pads[i] + pads[i + 2] - kernel[i] for i, side in enumerate(sides)]
    need(min(padded) >= 0, all(pads[i] < kernel[i % 2] for i in range(4)))
    return Known(
        floats(given), (batch, out, *(size // stride + 1 for size, stride in zip(padded, strides, strict=True)))
    )


def _scales(x: Known, scale: Known, zero: Known, attributes: Attributes) -> None:
    """Checks the scale and zero point of codes, which are one each, or one for each place of an axis."""
    need(scale.dtype == "float32", zero.dtype == "int8", scale.shape == zero.shape)
    if scale.shape not in ((), (1,)):
        need(scale.shape == (x.shape[axis_of(attributes, len(x.shape), 1)],))


def _quantize(given: list[Known], attributes: Attributes) -> Known:
    x, scale, zero = given
    _scales(x, scale, zero, attributes)
    need(x.dtype == "float32")
    return Known("int8", x.shape)


def _dequantize(given: list[Known], attributes: Attributes) -> Known:
    x, scale, zero = given
    _scales(x, scale, zero, attributes)
    need(x.dtype == "int8")
    return Known("float32", x.shape)


def _expand(given: list[Known], attributes: Attributes) -> Known:
    x, shape = given
    sizes = whole_vector(shape)
    need(min(sizes) >= 1)
    return Known(same_type([x]), broadcast(x.shape, sizes), None, x.bounds)


def _gather(given: list[Known], attributes: Attributes) -> Known:
    x, rows = given
    axis = axis_of(attributes, len(x.shape))
    _number_rows(rows, x.shape[axis])
    return Known(same_type([x]), x.shape[:axis] + rows.shape + x.shape[axis + 1 :], None, x.bounds)


def _scatter(given: list[Known], attributes: Attributes) -> Known:
    x, rows, updates = given
    _number_rows(rows, x.shape[0])
    need(rows.shape[1:] == (1,), updates.shape == rows.shape[:1] + x.shape[1:])
    if x.dtype != "int64":
        return Known(floats([x, updates]), x.shape)
    (a, b), (c, d) = bounds_of(x, updates)
    need(updates.dtype == "int64")
    return whole(x.shape, (min(a, c), max(b, d)))


def _number_rows(rows: Known, count: int) -> None:
    """Checks that all of these numbers are of rows of which there are so many."""
    ((low, high),) = bounds_of(rows)
    need(rows.dtype == "int64", low >= 0, high < count)


def _gemm(given: list[Known], attributes: Attributes) -> Known:
    a, b, *c = given
    (m, k), (first, second) = a.shape, b.shape
    inner, n = (second, first) if attributes.get("transB") else (first, second)
    need(inner == k, len(c) <= 1, all(broadcast(value.shape, (m, n)) == (m, n) for value in c))
    return Known(floats(given), (m, n))


def _matmul(given: list[Known], attributes: Attributes) -> Known:
    a, b = given
    (*left, m, k), (*right, inner, n) = a.shape, b.shape
    need(inner == k)
    return Known(floats(given), (*broadcast(tuple(left), tuple(right)), m, n))


def _layer_norm(given: list[Known], attributes: Attributes) -> Known:
    x, weight, bias = given
    need(axis_of(attributes, len(x.shape), -1) == len(x.shape) - 1, weight.shape == bias.shape == x.shape[-1:])
    return Known(floats(given), x.shape)


def _reduce(given: list[Known], attributes: Attributes) -> Known:
    x, axes = given
    keeps, chosen = attributes.get("keepdims", 1), whole_vector(axes)
    need(all(0 <= axis < len(x.shape) for axis in chosen), len(set(chosen)) == len(chosen) > 0)
    shape = tuple((1 if i in chosen else size) for i, size in enumerate(x.shape) if keeps or i not in chosen)
    if x.dtype != "int64":
        return Known(floats([x]), shape)
    ((low, high),) = bounds_of(x)
    count = math.prod(x.shape[axis] for axis in chosen)
    return whole(shape, (low * count, high * count))


def _largest(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    need(math.prod(x.shape) > 0)
    shape = (1,) * len(x.shape) if attributes.get("keepdims", 1) else ()
    return Known(same_type([x]), shape, None, x.bounds)


def _reshape(given: list[Known], attributes: Attributes) -> Known:
    x, wanted = given
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(whole_vector(wanted))]
    count, rest = math.prod(x.shape), math.prod(size for size in sizes if size != -1)
    need(sizes.count(-1) <= 1, all(size >= -1 for size in sizes), rest > 0)
    shape = tuple(count // rest if size == -1 else size for size in sizes)
    need(math.prod(shape) == count)
    return Known(same_type([x]), shape, x.values, x.bounds)


def _shape(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    start, end = attributes.get("start", 0), attributes.get("end", len(x.shape))
    need(0 <= start < end <= len(x.shape))
    return whole((end - start,), None, x.shape[start:end])


def _slice(given: list[Known], attributes: Attributes) -> Known:
    x, *ends = given
    (start,), (end,), (axis,) = map(whole_vector, ends)
    need(0 <= axis < len(x.shape))
    end = end + x.shape[axis] if end < 0 else end
    need(0 <= start < end <= x.shape[axis])
    values = x.values[start:end] if x.values is not None and len(x.shape) == 1 else None
    return Known(same_type([x]), (*x.shape[:axis], end - start, *x.shape[axis + 1 :]), values, x.bounds)


def _split(given: list[Known], attributes: Attributes) -> list[Known]:
    x, sizes = given
    axis, parts, dtype = axis_of(attributes, len(x.shape)), whole_vector(sizes), floats([x])
    need(min(parts) >= 1, sum(parts) == x.shape[axis])
    return [Known(dtype, (*x.shape[:axis], part, *x.shape[axis + 1 :])) for part in parts]


def _squeeze(given: list[Known], attributes: Attributes) -> Known:
    x, axes = given
    (axis,) = whole_vector(axes)
    need(0 <= axis < len(x.shape) and x.shape[axis] == 1)
    return Known(same_type([x]), x.shape[:axis] + x.shape[axis + 1 :], x.values, x.bounds)


def _unsqueeze(given: list[Known], attributes: Attributes) -> Known:
    x, axes = given
    (axis,) = whole_vector(axes)
    need(0 <= axis <= len(x.shape), x.dtype in (*FLOATS, *WHOLE))
    return x._replace(shape=(*x.shape[:axis], 1, *x.shape[axis:]))


def _transpose(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    perm = attributes["perm"]
    need(sorted(perm) == list(range(len(x.shape))))
    return Known(floats(given), tuple(x.shape[i] for i in perm))


RULES: Mapping[str, Rule] = {
    **ELEMENTWISE,
    "Concat": _concat,
    "Conv": _conv,
    "CumSum": _cumulated,
    "DequantizeLinear": _dequantize,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "QuantizeLinear": _quantize,
    "ReduceMax": _largest,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "ScatterND": _scatter,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""What each operator makes of its inputs; ValueError where it cannot."""
