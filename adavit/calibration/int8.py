"""Engines in int8: explicit Q/DQ around the linear layers, inserted by Model Optimizer at ranges measured here.

Activations take one scale per tensor and 8 bits. Weights take one scale per output channel and 7 bits: CPUs
without VNNI add two products of unsigned and signed bytes in 16 bits, which saturates with 8-bit weights, in
ONNX Runtime as in OpenVINO. With 7 bits the integers are exact, and every backend computes the same.
"""

from __future__ import annotations

import struct
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from adavit.calibration.linear import GATHERED, linear_layers
from adavit.calibration.modelopt import finished, model_optimizer

__all__ = ["to_int8", "weights_to_int8"]

ACTIVATION_LEVELS = 127
WEIGHT_LEVELS = 64

Float = npt.NDArray[np.float32]


def to_int8(model: onnx.ModelProto, thresholds: Mapping[str, float], head_width: int) -> onnx.ModelProto:
    """An engine whose linear layers run in int8: those with embedded weights that have a threshold.

    Args:
        model: the engine in fp32.
        thresholds: by site, the magnitude of the layer's input that saturates.
        head_width: channels of a head.
    """
    from modelopt.onnx.quantization import quantize
    from modelopt.onnx.quantization.qdq_utils import qdq_to_dq

    layers = [layer for layer in linear_layers(model) if layer.site in thresholds and layer.weight not in GATHERED]
    if not layers:
        return model
    scales = {layer.tensor: (thresholds[layer.site] or 1.0) / ACTIVATION_LEVELS for layer in layers}  # 0: all are 0
    with model_optimizer(), tempfile.TemporaryDirectory() as folder:
        source, target, cache = (Path(folder) / name for name in ("engine.onnx", "int8.onnx", "scales"))
        onnx.save(model, source)  # A copy: Model Optimizer writes over what it reads.
        lines = [f"{tensor}: {struct.pack('!f', scale).hex()}\n" for tensor, scale in sorted(scales.items())]
        cache.write_text("".join(["scales\n", *lines]), encoding="utf-8")
        quantize(
            str(source),
            quantize_mode="int8",
            calibration_data_reader=_Ones(model, head_width),
            calibration_method="max",
            calibration_cache_path=str(cache),
            calibration_eps=["cpu"],
            nodes_to_quantize=[f"^{layer.node.name}$" for layer in layers],
            high_precision_dtype="fp32",
            disable_mha_qdq=True,
            enable_gemv_detection_for_trt=False,
            log_level="CRITICAL",
            output_path=str(target),
        )
        quantised = onnx.load(target)
    _narrow_weights(quantised)
    coded = qdq_to_dq(quantised)
    _separate(coded)
    return finished(coded, model)


class _Ones:
    """One sample, for Model Optimizer to run the engine: the scales it finds are overruled by our own."""

    def __init__(self, model: onnx.ModelProto, head_width: int) -> None:
        sizes = {"K": 2, "h": 1, "c": head_width, "B": 1}
        self._sample = {}
        for value in model.graph.input:
            kind = value.type.tensor_type
            shape = [dim.dim_value or sizes[dim.dim_param] for dim in kind.shape.dim]
            integers = kind.elem_type == TensorProto.INT64  # the kept head: the first
            self._sample[value.name] = np.zeros(shape, np.int64) if integers else np.ones(shape, np.float32)
        self._given = False

    def get_next(self) -> dict[str, Any] | None:
        given, self._given = self._given, True
        return None if given else self._sample

    def get_first(self) -> dict[str, Any]:
        return self._sample

    def rewind(self) -> None:
        self._given = False


def _narrow_weights(model: onnx.ModelProto) -> None:
    """Sets the scales of the weights so that their codes take 7 bits."""
    embedded = {value.name: value for value in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in embedded:
            weight = numpy_helper.to_array(embedded[node.input[0]])
            scale = embedded[node.input[1]]
            scale.CopyFrom(numpy_helper.from_array(_scales(weight).ravel(), scale.name))


def _scales(weight: Float, axis: int = -1) -> Float:
    """One scale for each output channel, which are in one dimension, so that they fit beside the weights."""
    over = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    largest = np.abs(weight).max(over, keepdims=True)
    return np.where(largest > 0, largest / WEIGHT_LEVELS, 1).astype(np.float32)


def _separate(model: onnx.ModelProto) -> None:
    """Gives every product a Q/DQ pair of its own, and leaves out zero points that are 0.

    ONNX Runtime fuses neither products that share a pair nor, as fast, those with a vector of zero points.
    """
    graph = model.graph
    makers = {node.output[0]: node for node in graph.node}
    readers: Counter[str] = Counter()
    for product in [node for node in graph.node if node.op_type == "MatMul"]:
        dequantise, weight = (makers.get(name) for name in product.input)
        if dequantise is None or weight is None or {dequantise.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        del weight.input[2:]
        shared = readers[dequantise.name]
        readers[dequantise.name] += 1
        if shared:
            place = list(graph.node).index(product)
            for node in (dequantise, makers[dequantise.input[0]]):
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.name, copy.output[0] = f"{node.name}_{shared}", f"{node.output[0]}_{shared}"
                if node is dequantise:
                    copy.input[0], product.input[0] = f"{node.input[0]}_{shared}", copy.output[0]
                graph.node.insert(place, copy)


def weights_to_int8(weights: onnx.ModelProto) -> onnx.ModelProto:
    """The engine that gathers a sub-layer's weights, which it holds as int8 codes and hands over as float32.

    OpenVINO multiplies int8 by int8 weights that are not constant wrongly, so the codes are not handed over; and
    TensorRT takes int8 constants only before a DequantizeLinear, so they become floats before they are gathered.
    """
    model = onnx.ModelProto()
    model.CopyFrom(weights)
    graph = model.graph
    one, zero = "codes.scale", "codes.zero"
    graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), one))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), zero))
    producers = {node.output[0]: node for node in graph.node}
    for output in graph.output:
        if output.name not in GATHERED:
            continue
        gather = last = producers[output.name]
        while gather.op_type != "Gather":
            gather = producers[gather.input[0]]
        table = next(value for value in graph.initializer if value.name == gather.input[0])
        axis = -2 if output.name == "qkv" else -1  # of the output channels
        channels = output.type.tensor_type.shape.dim[axis].dim_value
        weight = numpy_helper.to_array(table)
        by_channel = weight if axis == -2 else weight.reshape(-1, channels)
        scales = _scales(by_channel, axis)[0]
        codes = np.rint(by_channel / scales).astype(np.int8)
        table.CopyFrom(numpy_helper.from_array(codes.reshape(weight.shape), table.name))
        scale, floats, gathered = (f"{output.name}.{part}" for part in ("scale", "floats", "gathered"))
        graph.initializer.append(numpy_helper.from_array(scales, scale))
        graph.node.insert(0, helper.make_node("DequantizeLinear", [table.name, one, zero], [floats], name=floats))
        gather.input[0], last.output[0] = floats, gathered
        graph.node.append(helper.make_node("Mul", [gathered, scale], [output.name], name=output.name))
    return finished(model, weights)
