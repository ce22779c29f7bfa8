"""Graphs of ONNX Runtime that gather the weights of kept heads."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cases import WIDE

import adavit
from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import BOTH, BlockKey
from adavit.bundle.onnx_format import Node
from adavit.bundle.onnx_write import new_node
from adavit.errors import BundleError
from adavit.runtime.backends.onnxruntime.gather import gather_heads


@pytest.fixture(scope="module")
def graphs(wide: tuple[Path, Path]) -> Graphs:
    return adavit.load(wide[0], threads=1, specialise=False).graphs


@pytest.mark.parametrize("heads", [(), (2,), (0, 1, 4), tuple(range(WIDE.heads))], ids=str)
def test_it_computes_what_the_graph_computes_that_is_handed_them(heads: tuple[int, ...], graphs: Graphs) -> None:
    block, source = 1, np.random.default_rng(0)
    graph = graphs.block(block, BOTH)
    gathering = gather_heads(graph, WIDE, graphs.tensors, block)
    given = {"x": source.standard_normal((WIDE.tokens, WIDE.width), np.float32), "tokens": np.array([0, 2, 3])}
    found = run(gathering.model({}), {**given, "heads": np.array(heads, np.int64)} | gathering.arrays(graphs.tensors))
    handed = graphs.head_weights(BlockKey(block, BOTH, heads))
    wanted = run(graph.model({}), {**given, **handed} | graph.arrays(graphs.tensors))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def run(model: bytes, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: given[value.name] for value in session.get_inputs()})


@pytest.mark.parametrize(
    "changed",
    [
        lambda node: [],
        lambda node: [node, replace_inputs(node, ["x", "qkv"], "second")],
        lambda node: [new_node("Gemm", node.name, node.inputs, node.outputs)],
        lambda node: [new_node("MatMul", node.name, node.inputs, node.outputs)],
        lambda node: [replace_inputs(node, [*node.inputs, "qkv_bias"], node.name)],
    ],
)
def test_another_product_is_refused(changed: Callable[[Node], Sequence[Node]], graphs: Graphs) -> None:
    graph = graphs.block(1, BOTH)
    (at,) = (place for place, node in enumerate(graph.nodes) if "qkv" in node.inputs)
    nodes = (*graph.nodes[:at], *changed(graph.nodes[at]), *graph.nodes[at + 1 :])
    with pytest.raises(BundleError, match="multiplies by qkv in another way"):
        gather_heads(replace(graph, nodes=nodes), WIDE, graphs.tensors, 1)


def replace_inputs(node: Node, inputs: Sequence[str], name: str) -> Node:
    return new_node(node.op, name, inputs, [name], transB=1)
