"""The linear layers of the engines: what is quantised, and whose inputs have ranges."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx

__all__ = ["GATHERED", "Linear", "linear_layers", "unit"]

_WEIGHT = re.compile(r"(blocks\.\d+)\.(?:attn|mlp)\.(query|key|value|proj|fc1|fc2)\.weight")
_ROLES = {"query": "qkv", "key": "qkv", "value": "qkv"}
GATHERED = ("qkv", "proj", "fc1")
"""Weights that the gathering engines hand over, by the name of that input."""


@dataclass(frozen=True)
class Linear:
    """A product with weights.

    Attributes:
        node: the MatMul.
        tensor: what it reads.
        weight: its weights, embedded or handed over.
        site: the layer that it is in whatever engine, such as "blocks.3.fc1"; query, key and value are "qkv".
    """

    node: onnx.NodeProto
    tensor: str
    weight: str
    site: str


def unit(engine: str) -> str:
    """The sub-layer of an engine, such as "blocks.3.mlp" of "blocks.3.mlp_gather"; other engines are their own."""
    return re.sub(r"_(gather|weights)$", "", engine)


def linear_layers(model: onnx.ModelProto) -> list[Linear]:
    """The linear layers of an engine's sub-layers, in the order they run; stem, head and decisions have none."""
    handed = {value.name for value in model.graph.input} & set(GATHERED)
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        weight = next((name for name in node.input if name in handed or _WEIGHT.fullmatch(name)), "")
        tensor = next(name for name in node.input if name != weight)
        if match := _WEIGHT.fullmatch(weight):
            site = f"{match[1]}.{_ROLES.get(match[2], match[2])}"
        elif weight in handed:
            site = f"{model.graph.name.rsplit('.', 1)[0]}.{weight}"
        else:
            continue
        found.append(Linear(node, tensor, weight, site))
    return found
