"""What operators make that work on each number for itself: the type, the shape, and bounds of whole numbers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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
    numbers_of,
    same_type,
    whole,
)

__all__ = ["ELEMENTWISE"]

ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Div": operator.floordiv,
    "Mul": operator.mul,
    "Sub": operator.sub,
}


def _elementwise(op: str) -> Rule:
    """A rule of arithmetic on two values, of floats or of whole numbers."""

    def rule(given: list[Known], attributes: Attributes) -> Known:
        first, second = given
        shape = broadcast(first.shape, second.shape)
        if first.dtype != "int64":
            return Known(floats(given), shape)
        need(second.dtype == "int64")
        (a, b), (c, d) = bounds_of(first, second)
        if op == "Div":  # towards 0 in ONNX, down in Python: the same where nothing is negative
            need(a >= 0, c > 0)
        compute = ARITHMETIC[op]
        ends = [compute(x, y) for x in (a, b) for y in (c, d)]
        numbers = numbers_of(first), numbers_of(second)
        values = compute(*numbers) if all(each is not None for each in numbers) else None
        return whole(shape, (min(ends), max(ends)), values)

    return rule


def _extreme(op: str) -> Rule:
    """A rule of Min or Max."""
    pick = min if op == "Min" else max

    def rule(given: list[Known], attributes: Attributes) -> Known:
        shape = broadcast(*(value.shape for value in given))
        dtype = same_type(given)
        if dtype != "int64":
            return Known(floats(given), shape)
        bounds = bounds_of(*given)
        numbers = [numbers_of(value) for value in given]
        many = np.minimum if op == "Min" else np.maximum
        values = None
        if all(each is not None for each in numbers):
            values = functools.reduce(many, [each for each in numbers if each is not None])
        return whole(shape, (pick(low for low, _ in bounds), pick(high for _, high in bounds)), values)

    return rule


def _compare(given: list[Known], attributes: Attributes) -> Known:
    first, second = given
    need(same_type(given) != "bool")
    return Known("bool", broadcast(first.shape, second.shape), None, (0, 1))


def _logic(given: list[Known], attributes: Attributes) -> Known:
    need(len(given) <= 2, all(value.dtype == "bool" for value in given))
    return Known("bool", broadcast(*(value.shape for value in given)), None, (0, 1))


def _where(given: list[Known], attributes: Attributes) -> Known:
    chosen, *values = given
    need(chosen.dtype == "bool", len(values) == 2)
    dtype, shape = same_type(values), broadcast(*(value.shape for value in given))
    if dtype in FLOATS:
        return Known(dtype, shape)
    need(dtype == "int64")
    (a, b), (c, d) = bounds_of(*values)
    return whole(shape, (min(a, c), max(b, d)))


def _unary(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    return Known(floats(given), x.shape)


def _softmax(given: list[Known], attributes: Attributes) -> Known:
    axis_of(attributes, len(given[0].shape), -1)
    return _unary(given, attributes)


def _cast(given: list[Known], attributes: Attributes) -> Known:
    (x,) = given
    dtype = {1: "float32", 7: "int64", 10: "float16"}[attributes["to"]]
    if dtype == "int64":
        need(x.dtype == "bool")
        return x._replace(dtype=dtype)
    need(x.dtype in (*FLOATS, *WHOLE))
    return Known(dtype, x.shape)


ELEMENTWISE: Mapping[str, Rule] = {
    **{op: _elementwise(op) for op in ARITHMETIC},
    **{op: _extreme(op) for op in ("Max", "Min")},
    **dict.fromkeys(("Abs", "Erf", "Exp", "Gelu", "Sqrt"), _unary),
    **dict.fromkeys(("Equal", "Greater", "Less"), _compare),
    **dict.fromkeys(("And", "Not", "Or"), _logic),
    "Cast": _cast,
    "Softmax": _softmax,
    "Where": _where,
}
