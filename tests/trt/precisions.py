"""Bundles in other precisions, made without calibration: what matters here is whether TensorRT builds them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from cases import read_config, write_config
from onnx import TensorProto, helper, numpy_helper

from adavit.files import sha256

Convert = Callable[[onnx.ModelProto], None]


def to_fp16(model: onnx.ModelProto) -> None:
    """Everything in half precision but what goes in and out, which is cast."""
    graph = model.graph
    for weight in graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    inputs, outputs = (
        {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        for values in (graph.input, graph.output)
    )
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}.half" if name in inputs | outputs else name for name in names]
    casts = [(name, f"{name}.half", TensorProto.FLOAT16) for name in sorted(inputs)]
    casts += [(f"{name}.half", name, TensorProto.FLOAT) for name in sorted(outputs)]
    nodes = [helper.make_node("Cast", [x], [y], name=f"cast.{y}", to=kind) for x, y, kind in casts]
    made = [*nodes[: len(inputs)], *graph.node, *nodes[len(inputs) :]]
    made = [onnx.NodeProto.FromString(node.SerializeToString()) for node in made]
    del graph.node[:]
    graph.node.extend(made)


def to_int8(model: onnx.ModelProto) -> None:
    """Explicit Q/DQ around every product with constant weights; the rest stays float32."""
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name, weight = node.name, numpy_helper.to_array(weights[node.input[1]])
            scale = np.maximum(np.abs(weight).max(0), 1e-6).astype(np.float32) / 127
            constants = {
                "weight": np.round(weight / scale).astype(np.int8), "weight_scale": scale,
                "weight_zero": np.zeros(len(scale), np.int8), "scale": np.float32(0.05), "zero": np.int8(0),
            }  # fmt: skip
            for kind, value in constants.items():
                graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}.{kind}"))
            x, scale_zero = node.input[0], [f"{name}.scale", f"{name}.zero"]
            nodes += [
                helper.make_node("QuantizeLinear", [x, *scale_zero], [f"{name}.q"], name=f"{name}.q"),
                helper.make_node("DequantizeLinear", [f"{name}.q", *scale_zero], [f"{name}.dq"], name=f"{name}.dq"),
                helper.make_node(
                    "DequantizeLinear", [f"{name}.weight", f"{name}.weight_scale", f"{name}.weight_zero"],
                    [f"{name}.weight.dq"], name=f"{name}.weight.dq", axis=1,
                ),
            ]  # fmt: skip
            node.input[:] = [f"{name}.dq", f"{name}.weight.dq"]
        nodes.append(node)
    made = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(made)


def converted(bundle: Path, convert: Convert) -> Path:
    """Changes every engine of a bundle, inputs and outputs aside."""
    config = read_config(bundle)
    for spec in config["engines"].values():
        model = onnx.load(bundle / spec["file"])
        convert(model)
        data = model.SerializeToString()
        (bundle / spec["file"]).write_bytes(data)
        spec.update(bytes=len(data), sha256=sha256(data))
    write_config(bundle, config)
    return bundle
