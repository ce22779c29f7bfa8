"""Blocks and their decisions as OpenVINO models that take their weights as inputs; the mask for rows not there.

Weights are the factors that OpenVINO rearranges fastest where they are no constants: qkv left ones, the others right
ones, of which fc2 is transposed. Those of h kept heads with c = h * d channels are qkv [h, 3d, D], qkv_bias [h, 3d, 1]
where the model has one, and proj [c, D]; fc1 [c + 2, hidden] and heads [h], the heads' numbers. The others have their
names in a checkpoint's block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import openvino
import openvino.opset13 as opset

from adavit.architecture import Architecture

__all__ = [
    "block_model",
    "decide_model",
    "mask_of",
    "mask_scores",
    "names_of",
]

ANY = -1
"""A size that varies."""
MASKED = -1e30
"""Added to the scores of rows that are not there: the softmax makes exact zeros of them."""


@lru_cache(1024)
def mask_of(count: int, rows: int) -> Any:
    """The mask, [rows], where `count` of some rows are there."""
    mask = np.zeros(rows, np.float32)
    mask[count:] = MASKED
    return openvino.Tensor(mask)


def mask_scores(model: Any) -> bool:
    """Gives a model with attention a last input, `mask_of`, which is added to every row of the scores.

    Returns:
        Whether it has attention.
    """
    masks = False
    for node in model.get_ops():
        if node.get_type_name() == "Softmax":
            scores = node.input_value(0)
            mask = opset.parameter(openvino.PartialShape([ANY]), np.float32)
            added = opset.add(scores, opset.convert(mask, scores.get_element_type().to_string()))
            node.input(0).replace_source_output(added.output(0))
            model.add_parameters([mask])
            masks = True
    return masks


def decide_model(arch: Architecture, choices: int) -> Any:
    """`blocks.i.decide`, for so many `choices` of heads and sub-layers."""
    take = Inputs()
    x = take("x", arch.tokens, arch.width)
    outputs = {"normed": _normed(arch, take, "norm1", x)}
    if arch.token_policy:
        outputs["tokens"] = opset.reshape(_token_logits(arch, take, x), _ints(-1, 1), False)
    if choices:
        outputs["choices"] = _choice_logits(arch, take, x, choices)
    return _model("decide", take, outputs)


def block_model(arch: Architecture, kind: str, dtype: Any, choices: int | None) -> Any:
    """`blocks.i.attention_set`, `mlp_set` or `both_set`, by its kind, or `decide_set`.

    Where tokens are decided on, `kept` [K] are the numbers of the kept ones, and behind them the first of them again,
    whose row comes out the same every time; attention takes it once by the `mask` [K].

    Args:
        arch: the model's shapes.
        kind: "attention", "mlp", "both" or "decide".
        dtype: of the weights of heads.
        choices: how many heads and sub-layers are decided on; None where the head comes behind.
    """
    take = Inputs()
    x = take("x", arch.tokens, arch.width)
    outputs = {}
    if kind != "decide":
        x = outputs["y"] = _sublayers(arch, take, dtype, kind, x)
    if choices is None:
        outputs["logits"] = _head(arch, take, dtype, x)
    else:
        if arch.token_policy:
            thresholds = take("token_thresholds", arch.tokens)
            outputs["next_kept"] = opset.greater(_token_logits(arch, take, x), thresholds)
        if choices:
            thresholds = take("choice_thresholds", choices)
            outputs["next_choices"] = opset.greater(_choice_logits(arch, take, x, choices), thresholds)
    return _model(f"{kind}_set", take, outputs)


class Inputs:
    """Makes a model's inputs, by the names that they get.

    Attributes:
        made: all of them.
    """

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __call__(self, name: str, *shape: int, dtype: Any = np.float32) -> Any:
        """A further input."""
        self.made.append(opset.parameter(openvino.PartialShape(list(shape)), dtype, name=name))
        return self.made[-1]


def names_of(ports: Sequence[Any]) -> list[str]:
    """The names of a compiled model's inputs, or its outputs, as they are given here."""
    return [port.get_node().get_friendly_name() for port in ports]


def _model(name: str, take: Inputs, outputs: Mapping[str, Any]) -> Any:
    results = [opset.result(output, name=key) for key, output in outputs.items()]
    return openvino.Model(results, take.made, name)


def _sublayers(arch: Architecture, take: Inputs, dtype: Any, kind: str, x: Any) -> Any:
    """The kept sub-layers on the kept tokens of x [N, D], put back where they were: [N, D]."""
    kept = take("kept", ANY, dtype=np.int32) if arch.token_policy else None
    by_row = opset.constant(np.int64(0))
    rows = x if kept is None else opset.gather(x, kept, by_row)
    if kind != "mlp":
        rows = _attention(arch, take, dtype, rows)
    if kind != "attention":
        rows = _mlp(arch, take, dtype, rows)
    return rows if kept is None else opset.scatter_update(x, kept, rows, by_row)


def _attention(arch: Architecture, take: Inputs, dtype: Any, x: Any) -> Any:
    """The attention sub-layer, residual included: [K, D] -> [K, D]."""
    d, width = arch.head_width, arch.width
    normed = _normed(arch, take, "norm1", x)
    product = opset.matmul(_float(take("qkv", ANY, 3 * d, width, dtype=dtype)), normed, False, True)  # [h, 3d, K]
    if arch.qkv_bias:
        product = opset.add(product, take("qkv_bias", ANY, 3 * d, 1))
    projection = _float(take("proj", ANY, width, dtype=dtype))
    query, key, value = opset.split(product, opset.constant(np.int64(1)), 3).outputs()
    scores = opset.matmul(opset.transpose(query, _ints(0, 2, 1)), key, False, False)
    if arch.token_policy:
        scores = opset.add(scores, take("mask", ANY))
    mixed = opset.matmul(opset.softmax(scores, -1), opset.transpose(value, _ints(0, 2, 1)), False, False)
    joined = opset.reshape(opset.transpose(mixed, _ints(1, 0, 2)), _ints(0, -1), True)
    update = opset.add(opset.matmul(joined, projection, False, False), take("attn.proj.bias", width))
    return opset.add(update, x)


def _mlp(arch: Architecture, take: Inputs, dtype: Any, x: Any) -> Any:
    """The MLP sub-layer, residual included: [K, D] -> [K, D].

    The first layer's bias is two rows of its weights, for inputs of one: an addition of its own would keep the GELU
    from being computed with the product. Two, since one is rounded to bfloat16, the other is the rest.
    """
    width, hidden = arch.width, arch.hidden
    heads = take("heads", ANY, dtype=np.int64)
    first = _float(take("fc1", ANY, hidden, dtype=dtype))
    by_head = opset.reshape(_normed(arch, take, "norm2", x), _ints(0, arch.heads, arch.head_width), True)
    joined = opset.reshape(opset.gather(by_head, heads, opset.constant(np.int64(1))), _ints(0, -1), True)
    ones = opset.broadcast(opset.constant(np.float32(1)), opset.concat([_rows_of(x), _ints(2)], 0))
    inner = opset.gelu(opset.matmul(opset.concat([joined, ones], 1), first, False, False), "erf")
    second = _float(take("mlp.fc2.weight", width, hidden, dtype=dtype))
    update = opset.add(opset.matmul(inner, second, False, True), take("mlp.fc2.bias", width))
    return opset.add(update, x)


def _token_logits(arch: Architecture, take: Inputs, x: Any) -> Any:
    """The logits of tokens [1, N] of x [N, D]; `token_select` has the scale and the bias of norm1 in it.

    Products are sums of products by element, here and of choices: OpenVINO would take bfloat16 for a MatMul, but keeps
    to float32 what comes behind the last one.
    """
    vector, offset = take("token_select.weight", 1, arch.width), take("token_select.bias", 1)
    logits = opset.add(opset.reduce_sum(opset.multiply(_centred(arch, x), vector), _ints(-1), False), offset)
    return opset.reshape(logits, _ints(1, -1), False)


def _choice_logits(arch: Architecture, take: Inputs, x: Any, choices: int) -> Any:
    """The logits of heads and sub-layers [1, C] of x [N, D]."""
    weights, offsets = take("choices.weight", choices, arch.width), take("choices.bias", choices)
    first = opset.slice(x, _ints(0), _ints(1), _ints(1), _ints(0))
    logits = opset.add(opset.reduce_sum(opset.multiply(first, weights), _ints(-1), False), offsets)
    return opset.reshape(logits, _ints(1, -1), False)


def _head(arch: Architecture, take: Inputs, dtype: Any, x: Any) -> Any:
    """The logits [1, C] of x [N, D]."""
    first = opset.slice(x, _ints(0), _ints(1), _ints(1), _ints(0))
    weights = _float(take("head.weight", arch.classes, arch.width, dtype=dtype))
    product = opset.matmul(_normed(arch, take, "norm", first), weights, False, True)
    return opset.add(product, take("head.bias", arch.classes))


def _normed(arch: Architecture, take: Inputs, name: str, x: Any) -> Any:
    scale, bias = take(f"{name}.weight", arch.width), take(f"{name}.bias", arch.width)
    return opset.add(opset.multiply(_centred(arch, x), scale), bias)


def _centred(arch: Architecture, x: Any) -> Any:
    """Rows of mean 0 and variance 1."""
    return opset.mvn(x, _ints(-1), True, arch.norm_epsilon, "inside_sqrt")


def _rows_of(x: Any) -> Any:
    """The number of rows, [1]."""
    return opset.gather(opset.shape_of(x, "i64"), _ints(0), opset.constant(np.int64(0)))


def _float(weights: Any) -> Any:
    """Weights as float32 in the model's terms; a plugin that computes in bf16 takes such ones as they are."""
    return weights if weights.get_element_type() == openvino.Type.f32 else opset.convert(weights, "f32")


def _ints(*values: int) -> Any:
    return opset.constant(np.array(values, np.int64))
