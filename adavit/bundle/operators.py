"""What each operator of a graph makes of its inputs: the type and the shape, or an error where it cannot."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["FAR", "MOST_DIMENSIONS", "RULES", "WHOLE", "Known", "whole"]

Shape = tuple[int, ...]
Bounds = tuple[int, int]
FLOATS = ("float32", "float16")
WHOLE = ("int64", "bool")
FEW = 64
"""Whole numbers of a value at most that are followed one by one."""
MOST_DIMENSIONS = 8


class Known(NamedTuple):
    """What is known of a value.

    Attributes:
        dtype: numpy's name of its type.
        shape: its dimensions.
        values: its numbers, where they are whole, few, and the same for every image.
        bounds: the least and the largest that its whole numbers can be.
    """

    dtype: str
    shape: Shape
    values: tuple[int, ...] | None = None
    bounds: Bounds | None = None


Attributes = Mapping[str, Any]
Rule = Callable[[list[Known], Attributes], Known | list[Known]]
ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Div": operator.floordiv,
    "Mul": operator.mul,
    "Sub": operator.sub,
}
FAR = 1 << 40
"""Beyond all whole numbers of a graph."""


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


def whole(shape: Shape, bounds: Bounds | None, values: Any = None, dtype: str = "int64") -> Known:
    """What is known of whole numbers; of too many, their bounds alone."""
    if values is None or np.size(values) > FEW:
        return Known(dtype, shape, None, bounds)
    numbers = tuple(int(number) for number in np.ravel(values))
    found = (min(numbers), max(numbers)) if numbers else None
    _need(found is None or -FAR <= found[0] <= found[1] <= FAR)
    return Known(dtype, shape, numbers, found)


def _numbers(value: Known) -> npt.NDArray[Any] | None:
    """All whole numbers of a value, where they are known."""
    return None if value.values is None else np.array(value.values, object).reshape(value.shape)


def _bounds(*given: Known) -> Sequence[Bounds]:
    """Of whole numbers; a value that nothing bounds does not fit."""
    _need(all(value.bounds is not None for value in given))
    found = [value.bounds or (0, 0) for value in given]
    _need(all(-FAR <= low <= high <= FAR for low, high in found))
    return found


def _same(given: Sequence[Known]) -> str:
    """The one type that values have."""
    dtype = given[0].dtype
    _need(dtype in (*FLOATS, *WHOLE), all(value.dtype == dtype for value in given))
    return dtype


def _elementwise(op: str) -> Rule:
    """A rule of arithmetic on two values, of floats or of whole numbers."""

    def rule(given: list[Known], attributes: Attributes) -> Known:
        first, second = given
        shape = _broadcast(first.shape, second.shape)
        if first.dtype != "int64":
            return Known(_floats(given), shape)
        _need(second.dtype == "int64")
        (a, b), (c, d) = _bounds(first, second)
        if op == "Div":  # towards 0 in ONNX, down in Python: the same where nothing is negative
            _need(a >= 0, c > 0)
        compute = ARITHMETIC[op]
        ends = [compute(x, y) for x in (a, b) for y in (c, d)]
        numbers = _numbers(first), _numbers(second)
        values = compute(*numbers) if all(each is not None for each in numbers) else None
        return whole(shape, (min(ends), max(ends)), values)

    return rule


def _extreme(op: str) -> Rule:
    """A rule of Min or Max."""
    pick = min if op == "Min" else max

    def rule(given: list[Known], attributes: Attributes) -> Known:
        shape = _broadcast(*(value.shape for value in given))
        dtype = _same(given)
        if dtype != "int64":
            return Known(_floats(given), shape)
        bounds = _bounds(*given)
        numbers = [_numbers(value) for value in given]
        many = np.minimum if op == "Min" else np.maximum
        values = None
        if all(each is not None for each in numbers):
            values = functools.reduce(many, [each for each in numbers if each is not None])
        return whole(shape, (pick(low for low, _ in bounds), pick(high for _, high in bounds)), values)

    return rule


def _compare(given: list[Known], attributes: Attributes) -> Known:
    first, second = given
    _need(_same(given) != "bool")
    return Known("bool", _broadcast(first.shape, second.shape), None, (0, 1))


def _logic(given: list[Known], attributes: Attributes) -> Known:
    _need(len(given) <= 2, all(value.dtype == "bool" for value in given))
    return Known("bool", _broadcast(*(value.shape for value in given)), None, (0, 1))


def _where(given: list[Known], attributes: Attributes) -> Known:
    chosen, *values = given
    _need(chosen.dtype == "bool", len(values) == 2)
    dtype, shape = _same(values), _broadcast(*(value.shape for value in given))
    if dtype in FLOATS:
        return Known(dtype, shape)
    _need(dtype == "int64")
    (a, b), (c, d) = _bounds(*values)
    return whole(shape, (min(a, c), max(b, d)))


def _cumulated(given: list[Known], attributes: Attributes) -> Known:
    """Sums of what comes before along the only axis."""
    x, axis = given
    _need(x.dtype == "int64", len(x.shape) == 1, axis.values == (0,), axis.shape == ())
    ((low, high),) = _bounds(x)
    _need(low >= 0, attributes.get("exclusive") in (None, 0, 1))
    return whole(x.shape, (0, high * (x.shape[0] - attributes.get("exclusive", 0))))


def _unary(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    return Known(_floats(given), x.shape)


def _softmax(given: list[Known], attributes: Attributes) -> Known:
    _axis(attributes, len(given[0].shape), -1)
    return _unary(given, attributes)


def _cast(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    dtype = {1: "float32", 7: "int64", 10: "float16"}[attributes["to"]]
    if dtype == "int64":
        _need(x.dtype == "bool")
        return x._replace(dtype=dtype)
    _need(x.dtype in (*FLOATS, *WHOLE))
    return Known(dtype, x.shape)


def _concat(given: list[Known], attributes: Attributes) -> Known:
    shapes = [value.shape for value in given]
    axis = _axis(attributes, len(shapes[0]))
    rests = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    _need(len(rests) == 1, len({len(shape) for shape in shapes}) == 1)
    shape = (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])
    if given[0].dtype not in WHOLE:
        return Known(_floats(given), shape)
    bounds = _bounds(*given)
    found = min(low for low, _ in bounds), max(high for _, high in bounds)
    flat = len(shape) == 1 and all(value.values is not None for value in given)
    values = [number for value in given for number in value.values or ()] if flat else None
    return whole(shape, found, values, _same(given))


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
    return Known(_same([x]), _broadcast(x.shape, sizes), None, x.bounds)


def _gather(given: list[Known], attributes: Attributes) -> Known:
    x, rows = given
    axis = _axis(attributes, len(x.shape))
    _number_rows(rows, x.shape[axis])
    return Known(_same([x]), x.shape[:axis] + rows.shape + x.shape[axis + 1 :], None, x.bounds)


def _scatter(given: list[Known], attributes: Attributes) -> Known:
    x, rows, updates = given
    _number_rows(rows, x.shape[0])
    _need(rows.shape[1:] == (1,), updates.shape == rows.shape[:1] + x.shape[1:])
    if x.dtype != "int64":
        return Known(_floats([x, updates]), x.shape)
    (a, b), (c, d) = _bounds(x, updates)
    _need(updates.dtype == "int64")
    return whole(x.shape, (min(a, c), max(b, d)))


def _number_rows(rows: Known, count: int) -> None:
    """Checks that all of these numbers are of rows of which there are so many."""
    ((low, high),) = _bounds(rows)
    _need(rows.dtype == "int64", low >= 0, high < count)


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
    shape = tuple((1 if i in chosen else size) for i, size in enumerate(x.shape) if keeps or i not in chosen)
    if x.dtype != "int64":
        return Known(_floats([x]), shape)
    ((low, high),) = _bounds(x)
    count = math.prod(x.shape[axis] for axis in chosen)
    return whole(shape, (low * count, high * count))


def _largest(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    _need(math.prod(x.shape) > 0)
    shape = (1,) * len(x.shape) if attributes.get("keepdims", 1) else ()
    return Known(_same([x]), shape, None, x.bounds)


def _reshape(given: list[Known], attributes: Attributes) -> Known:
    x, wanted = given
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(_whole(wanted))]
    count, rest = math.prod(x.shape), math.prod(size for size in sizes if size != -1)
    _need(sizes.count(-1) <= 1, all(size >= -1 for size in sizes), rest > 0)
    shape = tuple(count // rest if size == -1 else size for size in sizes)
    _need(math.prod(shape) == count)
    return Known(_same([x]), shape, x.values, x.bounds)


def _shape(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    start, end = attributes.get("start", 0), attributes.get("end", len(x.shape))
    _need(0 <= start < end <= len(x.shape))
    return whole((end - start,), None, x.shape[start:end])


def _slice(given: list[Known], attributes: Attributes) -> Known:
    x, *ends = given
    (start,), (end,), (axis,) = map(_whole, ends)
    _need(0 <= axis < len(x.shape))
    end = end + x.shape[axis] if end < 0 else end
    _need(0 <= start < end <= x.shape[axis])
    values = x.values[start:end] if x.values is not None and len(x.shape) == 1 else None
    return Known(_same([x]), (*x.shape[:axis], end - start, *x.shape[axis + 1 :]), values, x.bounds)


def _split(given: list[Known], attributes: Attributes) -> list[Known]:
    x, sizes = given
    axis, parts, dtype = _axis(attributes, len(x.shape)), _whole(sizes), _floats([x])
    _need(min(parts) >= 1, sum(parts) == x.shape[axis])
    return [Known(dtype, (*x.shape[:axis], part, *x.shape[axis + 1 :])) for part in parts]


def _squeeze(given: list[Known], attributes: Attributes) -> Known:
    x, axes = given
    (axis,) = _whole(axes)
    _need(0 <= axis < len(x.shape) and x.shape[axis] == 1)
    return Known(_same([x]), x.shape[:axis] + x.shape[axis + 1 :], x.values, x.bounds)


def _unsqueeze(given: list[Known], attributes: Attributes) -> Known:
    x, axes = given
    (axis,) = _whole(axes)
    _need(0 <= axis <= len(x.shape), x.dtype in (*FLOATS, *WHOLE))
    return x._replace(shape=(*x.shape[:axis], 1, *x.shape[axis:]))


def _transpose(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    perm = attributes["perm"]
    _need(sorted(perm) == list(range(len(x.shape))))
    return Known(_floats(given), tuple(x.shape[i] for i in perm))


RULES: Mapping[str, Rule] = {
    **{op: _elementwise(op) for op in ARITHMETIC},
    **{op: _extreme(op) for op in ("Max", "Min")},
    **dict.fromkeys(("Abs", "Erf", "Exp", "Gelu", "Sqrt"), _unary),
    **dict.fromkeys(("Equal", "Greater", "Less"), _compare),
    **dict.fromkeys(("And", "Not", "Or"), _logic),
    "Cast": _cast,
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
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
"""What each operator makes of its inputs; ValueError where it cannot."""
