"""Engines in fp16, by Model Optimizer's AutoCast."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto

from adavit.calibration.modelopt import finished, model_optimizer

__all__ = ["FP16_MAX", "halved_nodes", "to_fp16"]

FP16_MAX = 65504 / 2
"""Largest magnitude seen in calibration that fp16 is trusted with: half of what it can hold."""
_HALVED = ("MatMul", "Add", "Mul", "Gelu", "Erf", "Div", "Reshape", "Transpose", "Split", "Gather")
"""Operators that may run in fp16. Layer normalisation and softmax stay in fp32: they sum over many values."""


def halved_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of an engine that run in fp16: the linear layers and what lies between them.

    The residual stream stays in fp32, since every block adds a little to it, and so do the scale and bias of layer
    normalisations. In the dense twin, so do its stem and its head.
    """
    graph = model.graph
    weights = {value.name for value in graph.initializer}
    handed = {value.name for value in graph.input} - {"x"}
    inner = [i for i, node in enumerate(graph.node) if any(name.startswith("blocks.") for name in node.input)]
    first, last = (inner[0], inner[-1]) if graph.name == "dense" else (0, len(graph.node))
    found = []
    for node in list(graph.node)[first : last + 1]:
        constants = [name in weights for name in node.input]
        residual = node.op_type == "Add" and not any(constants) and handed.isdisjoint(node.input)
        normalisation = node.op_type == "Mul" and constants[0]
        if node.op_type in _HALVED and not (residual or normalisation):
            found.append(node)
    return found


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """An engine in fp16; tokens and logits stay float32 outside, gathered weights become float16."""
    from modelopt.onnx.autocast import convert_to_mixed_precision

    halved = {node.name for node in halved_nodes(model)}
    others = [f"^{re.escape(node.name)}$" for node in model.graph.node if node.name not in halved]
    gathers = model.graph.name.endswith("_weights")
    with model_optimizer(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.onnx"  # A copy: Model Optimizer writes over what it reads.
        onnx.save(model, path)
        converted = convert_to_mixed_precision(
            str(path),
            low_precision_type="fp16",
            nodes_to_exclude=others,
            keep_io_types=not gathers,
            data_max=float("inf"),  # Ranges are ours; see FP16_MAX.
            providers=["cpu"],
        )
    if model.graph.name.endswith("_gather"):
        _take_float16(converted)
    return finished(converted, model)


def _take_float16(model: onnx.ModelProto) -> None:
    """Makes the gathered weights float16 at the input, where AutoCast has cast them inside."""
    weights = ("qkv", "proj", "query_bias", "bias", "fc1")
    handed = {value.name: value for value in model.graph.input if value.name in weights}
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.input[0] in handed:
            handed[node.input[0]].type.tensor_type.elem_type = TensorProto.FLOAT16
            for reader in model.graph.node:
                reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
            model.graph.node.remove(node)
