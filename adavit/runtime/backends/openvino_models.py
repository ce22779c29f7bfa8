"""The parts of a block as OpenVINO models that take their weights as inputs, and the mask for rows that are not there.

Weights are left factors, or transposed right ones: what OpenVINO rearranges least where they are no constants.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import openvino
import openvino.opset13 as opset

from adavit.architecture import Architecture

__all__ = ["attention_model", "decide_model", "mask_of", "mask_scores", "mlp_model"]

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
            mask = _parameter(ANY)
            added = opset.add(scores, opset.convert(mask, scores.get_element_type().to_string()))
            node.input(0).replace_source_output(added.output(0))
            model.add_parameters([mask])
            masks = True
    return masks


def decide_model(arch: Architecture, tokens: bool, choices: int) -> Any:
    """`blocks.i.decide`: x [N, D], the norm's scale and bias [D], then what decides -> normed, then the logits.

    Args:
        arch: the model's shapes.
        tokens: whether tokens are decided on: by a vector [1, D] and an offset [1].
        choices: how many heads and sub-layers are decided on, by weights [choices, D] and offsets [choices].
    """
    x, scale, bias = inputs = [_parameter(arch.tokens, arch.width), _parameter(arch.width), _parameter(arch.width)]
    outputs = [_normed(arch, x, scale, bias)]
    if tokens:
        vector, offset = _parameter(1, arch.width), _parameter(1)
        inputs += [vector, offset]
        logits = opset.add(opset.matmul(vector, outputs[0], False, True), offset)
        outputs.append(opset.reshape(logits, _ints(-1, 1), False))
    if choices:
        weights, offsets = _parameter(choices, arch.width), _parameter(choices)
        inputs += [weights, offsets]
        first = opset.slice(x, _ints(0), _ints(1), _ints(1), _ints(0))
        outputs.append(opset.add(opset.matmul(first, weights, False, True), offsets))
    return openvino.Model([opset.result(output) for output in outputs], inputs, "decide")


def attention_model(arch: Architecture, dtype: Any) -> Any:
    """`blocks.i.attention_gather`.

    The inputs are x and normed [K, D]; of the kept heads qkv [h, 3d, D], their bias [h, 3d, 1] if the model has one,
    and the output projection [h * d, D]; the mask [K]; the projection's bias [D].

    Args:
        arch: the model's shapes.
        dtype: of the weights.
    """
    d, width = arch.head_width, arch.width
    x, normed = rows = [_parameter(ANY, width), _parameter(ANY, width)]
    qkv, projection = _parameter(ANY, 3 * d, width, dtype=dtype), _parameter(ANY, width, dtype=dtype)
    biases = [_parameter(ANY, 3 * d, 1)] if arch.qkv_bias else []
    mask, offset = _parameter(ANY), _parameter(width)
    product = opset.matmul(_float(qkv), normed, False, True)  # [h, 3d, K]
    for bias in biases:
        product = opset.add(product, bias)
    query, key, value = opset.split(product, opset.constant(np.int64(1)), 3).outputs()
    scores = opset.add(opset.matmul(opset.transpose(query, _ints(0, 2, 1)), key, False, False), mask)
    mixed = opset.matmul(opset.softmax(scores, -1), opset.transpose(value, _ints(0, 2, 1)), False, False)
    joined = opset.reshape(opset.transpose(mixed, _ints(1, 0, 2)), _ints(0, -1), True)
    update = opset.add(opset.matmul(joined, _float(projection), False, False), offset)
    inputs = [*rows, qkv, *biases, projection, mask, offset]
    return openvino.Model([opset.result(opset.add(update, x))], inputs, "attention")


def mlp_model(arch: Architecture, dtype: Any) -> Any:
    """`blocks.i.mlp_gather`.

    The inputs are x [K, D]; the kept heads' numbers [h] and their columns of the first layer [hidden, h * d]; the
    norm's scale and bias [D]; the first layer's bias [hidden], the second layer [D, hidden] and its bias [D].

    Args:
        arch: the model's shapes.
        dtype: of the weights.
    """
    width, hidden = arch.width, arch.hidden
    x, kept = _parameter(ANY, width), _parameter(ANY, dtype=np.int64)
    first = _parameter(hidden, ANY, dtype=dtype)
    scale, bias, offset = _parameter(width), _parameter(width), _parameter(hidden)
    second, last = _parameter(width, hidden, dtype=dtype), _parameter(width)
    by_head = opset.reshape(_normed(arch, x, scale, bias), _ints(0, arch.heads, arch.head_width), True)
    joined = opset.reshape(opset.gather(by_head, kept, opset.constant(np.int64(1))), _ints(0, -1), True)
    inner = opset.gelu(opset.add(opset.matmul(joined, _float(first), False, True), offset), "erf")
    update = opset.add(opset.matmul(inner, _float(second), False, True), last)
    inputs = [x, kept, first, scale, bias, offset, second, last]
    return openvino.Model([opset.result(opset.add(update, x))], inputs, "mlp")


def _normed(arch: Architecture, x: Any, scale: Any, bias: Any) -> Any:
    normed = opset.mvn(x, _ints(-1), True, arch.norm_epsilon, "inside_sqrt")
    return opset.add(opset.multiply(normed, scale), bias)


def _parameter(*shape: int, dtype: Any = np.float32) -> Any:
    return opset.parameter(openvino.PartialShape(list(shape)), dtype)


def _float(weights: Any) -> Any:
    """Weights as float32 in the model's terms; a plugin that computes in bf16 takes such ones as they are."""
    return weights if weights.get_element_type() == openvino.Type.f32 else opset.convert(weights, "f32")


def _ints(*values: int) -> Any:
    return opset.constant(np.array(values, np.int64))
