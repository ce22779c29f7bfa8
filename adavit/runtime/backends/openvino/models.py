"""What is changed in a bundle's graphs for OpenVINO: a mask of rows, the unfold of pixels, and layers in bf16."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import openvino.opset13 as opset

__all__ = [
    "HANDED",
    "MASK",
    "bf16_tensor_of",
    "compute_in_bf16",
    "mask_of",
    "mask_scores",
    "names_of",
    "rounded",
    "tensor_of",
    "unfold",
]

STEP = 16
"""Numbers of tokens are rounded up to all tokens less a multiple of this."""
MASK = "mask"
MASKED = -1e30
"""Added to the scores of rows that are not there: the softmax makes exact zeros of them."""
UNFOLD = "unfold"
"""The weights of the convolution that copies what an unfold sees."""
HANDED = ("qkv", "proj", "fc1", "fc2")
"""The weights of the large layers of a block."""
LARGE = (*HANDED, "attention1.kqv.weight", "attention2.kqv.weight", "project.weight")
"""With those of the layers that do three quarters of the T2T stem's multiply-accumulates."""

Array = npt.NDArray[Any]


def rounded(tokens: int, all_tokens: int) -> int:
    """The number of rows that are computed for so many tokens."""
    return all_tokens - (all_tokens - tokens) // STEP * STEP


@lru_cache(1024)
def mask_of(count: int, rows: int) -> Any:
    """The mask, [rows], where `count` of some rows are there."""
    mask = np.zeros(rows, np.float32)
    mask[count:] = MASKED
    return openvino.Tensor(mask)


def mask_scores(model: Any) -> None:
    """Gives a model with attention a last input, `mask_of`, which is added to every row of the scores."""
    for node in model.get_ops():
        if node.get_type_name() == "Softmax":
            mask = opset.parameter(openvino.PartialShape([-1]), np.float32, name=MASK)
            mask.output(0).set_names({MASK})
            added = opset.add(node.input_value(0), mask)
            node.input(0).replace_source_output(added.output(0))
            model.add_parameters([mask])


def unfold(model: Any) -> None:
    """Makes the unfold of pixels an operator of its own: exactly the same, in a third of the convolution's time."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution" or UNFOLD not in _inputs_of(node):
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
    """Makes the large linear layers, and nothing else, compute in bf16 and take weights in it.

    With bf16 as the precision of the whole model, decisions would be made in it, and the stem's many small operators
    would lose more by conversions than they gain.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "Convolution") or not set(LARGE).intersection(_inputs_of(node)):
            continue
        users = node.output(0).get_target_inputs()
        for port in node.inputs():
            source = port.get_source_output()
            made_by = source.get_node()
            if made_by.get_type_name() == "Parameter":
                made_by.set_element_type(openvino.Type.bf16)
                made_by.validate_and_infer_types()
            else:
                port.replace_source_output(opset.convert(source, "bf16").output(0))
        node.validate_and_infer_types()
        result = opset.convert(node, "f32").output(0)
        for user in users:
            user.replace_source_output(result)
    model.validate_nodes_and_infer_types()


def tensor_of(array: Array) -> Any:
    """A tensor of an array's own memory, which has to live as long; OpenVINO does not write to inputs.

    It takes writable memory alone. That of a bundle's weights is not, but holds them once.
    """
    if not array.flags.writeable:
        memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
        array = np.frombuffer(memoryview(memory), array.dtype).reshape(array.shape)
    return openvino.Tensor(array, shared_memory=True)


def bf16_tensor_of(array: npt.NDArray[np.float32]) -> Any:
    """A tensor of the nearest bfloat16 of finite numbers; ties go to the even one."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    found = openvino.Tensor(openvino.Type.bf16, openvino.Shape(array.shape))
    found.data.view(np.uint16)[...] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return found


def names_of(ports: Sequence[Any]) -> list[str]:
    """The names of a compiled model's inputs or outputs."""
    return [port.any_name for port in ports]


def _inputs_of(node: Any) -> list[str]:
    """The names of what a node reads, or what is reshaped for it."""
    found = [value.get_node() for value in node.input_values()]
    read = [made.input_value(0).get_node() if made.get_type_name() == "Reshape" else made for made in found]
    return [made.get_friendly_name() for made in read]


def _sizes(node: Any) -> list[int]:
    """The sizes of [B, ...] behind the batch."""
    return [size.get_length() for size in list(node.get_output_partial_shape(0))[1:]]
