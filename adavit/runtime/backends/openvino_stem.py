"""The T2T stem, which is in the dense twin as well, as OpenVINO runs it fastest."""

from __future__ import annotations

from typing import Any

import openvino.opset13 as opset

__all__ = ["compute_in_bf16", "restructure", "unfold"]

UNFOLD = "unfold"
"""The weights of the convolution that copies what an unfold sees."""
LARGE = ("kqv.weight", "project.weight")
"""How the names end of the weights of the layers that do three quarters of the stem's multiply-accumulates."""


def restructure(model: Any, bf16: bool) -> None:
    """Makes what OpenVINO runs faster of a graph with a T2T stem, and computes the stem's large layers in bf16."""
    unfold(model)
    if bf16:
        compute_in_bf16(model)


def unfold(model: Any) -> None:
    """Makes the unfold of pixels an operator of its own: exactly the same, in a third of the convolution's time."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution" or UNFOLD not in _names_of_inputs(node):
            continue
        made = node.get_attributes()
        begin, end = (opset.constant([0, 0, *made[key]]) for key in ("pads_begin", "pads_end"))
        padded = opset.pad(node.input_value(0), begin, end, "constant")
        # Of pictures of one channel, patches come in the order of the unfold: by channel, then by place.
        single = opset.reshape(padded, opset.constant([-1, 1, *_sizes(padded)[1:]]), False)
        kernel = list(node.input_value(1).get_shape()[2:])
        patches = opset.extract_image_patches(single, kernel, made["strides"], made["dilations"], "valid")
        node.output(0).replace(opset.reshape(patches, opset.constant([-1, *_sizes(node)]), False).output(0))


def compute_in_bf16(model: Any) -> None:
    """Makes the large linear layers compute in bf16, and nothing else.

    With bf16 as the precision of the whole model, its many small operators lose more by conversions than it gains; the
    small linear layers would gain 4 % of the stem's time and cost a quarter more rounding.
    """
    for node in model.get_ordered_ops():
        if not any(name.endswith(LARGE) for name in _names_of_inputs(node)):
            continue
        users = node.output(0).get_target_inputs()
        for port in node.inputs():
            port.replace_source_output(opset.convert(port.get_source_output(), "bf16").output(0))
        node.validate_and_infer_types()
        result = opset.convert(node, "f32").output(0)
        for user in users:
            user.replace_source_output(result)
    model.validate_nodes_and_infer_types()


def _names_of_inputs(node: Any) -> list[str]:
    return [value.get_node().get_friendly_name() for value in node.input_values()]


def _sizes(node: Any) -> list[int]:
    """The sizes of [B, ...] behind the batch."""
    return [size.get_length() for size in list(node.get_output_partial_shape(0))[1:]]
