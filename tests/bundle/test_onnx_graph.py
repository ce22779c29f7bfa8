"""A bundle's graphs, read without onnx and written as models with weights as inputs or constants."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cases import random_images, stored_files, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from adavit.bundle.bundle import WEIGHTS, Bundle
from adavit.bundle.graphs import Graphs
from adavit.bundle.head_weights import Quantised
from adavit.bundle.keys import BOTH, NONE, BlockKey, Sublayers
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.bundle.onnx_read import GraphReader
from adavit.bundle.onnx_write import new_node
from adavit.errors import BundleError

ARCH = tiny()


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Path) -> Graphs:
    return Graphs(Bundle.open(tiny_bundle))


def all_of(graphs: Graphs) -> dict[str, OnnxGraph]:
    """Every graph by its role."""
    found = {"stem": graphs.stem(), "dense": graphs.dense(), "batch.stem": graphs.batch_stem()}
    for block, files in enumerate(graphs.files.blocks):
        found |= {f"blocks.{block}.{sublayers.name}": graphs.block(block, sublayers) for sublayers in files}
        found[f"batch.{block}"] = graphs.batch_block(block)
    return found


def checked(data: bytes) -> onnx.ModelProto:
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(data: bytes, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, dict(inputs))


def test_weights_become_inputs(tiny_bundle: Path, graphs: Graphs) -> None:
    files = stored_files(tiny_bundle)
    for name, graph in all_of(graphs).items():
        model = checked(graph.model({}))
        stored = onnx.load(tiny_bundle / files[name], load_external_data=False)
        assert list(model.graph.node) == list(stored.graph.node)
        assert list(model.graph.output) == list(stored.graph.output)
        inside = {tensor.name for tensor in stored.graph.initializer if not tensor.external_data}
        outside = {tensor.name for tensor in stored.graph.initializer} - inside
        assert {tensor.name for tensor in model.graph.initializer} == inside
        assert {value.name for value in model.graph.input} == {v.name for v in stored.graph.input} | outside


def test_weights_become_constants(graphs: Graphs) -> None:
    for name, graph in all_of(graphs).items():
        constants = graph.arrays(graphs.tensors)
        model = checked(graph.model(constants))
        assert [value.name for value in model.graph.input] == [value.name for value in graph.inputs], name
        found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert found.keys() >= constants.keys()
        for constant, array in constants.items():
            np.testing.assert_array_equal(found[constant], array)


def block_inputs(graphs: Graphs, key: BlockKey) -> dict[str, np.ndarray]:
    """What a block's graph takes but for its own weights."""
    x = np.random.default_rng(0).standard_normal((ARCH.tokens, ARCH.width), dtype=np.float32)
    return {"x": x, "tokens": np.array([0, 2, 5, 16]), **graphs.head_weights(key)}


@pytest.mark.parametrize("heads", [(), (1,), (0, 2), (0, 1, 2)])
def test_heads_weights_are_inputs_or_constants(heads: tuple[int, ...], graphs: Graphs) -> None:
    key = BlockKey(1, BOTH, heads)
    graph, inputs = graphs.block(1, BOTH), block_inputs(graphs, key)
    own, handed = graph.arrays(graphs.tensors), dict(graphs.head_weights(key))
    given_as_inputs = run(graph.model(own), inputs)
    given_as_constants = run(graph.model(own | handed), {name: inputs[name] for name in ("x", "tokens")})
    assert [array.shape for array in given_as_inputs] == [(17, 48), (1, 17 + 3 + 2)]
    for found, wanted in zip(given_as_constants, given_as_inputs, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    y, x = given_as_inputs[0], inputs["x"]
    dropped = np.setdiff1d(np.arange(17), inputs["tokens"])
    np.testing.assert_array_equal(y[dropped], x[dropped])
    assert (y[inputs["tokens"]] != x[inputs["tokens"]]).any()


def test_int8_weights_are_dequantised(graphs: Graphs) -> None:
    key, source = BlockKey(1, Sublayers(False, True), (0, 2)), np.random.default_rng(0)
    graph, inputs = graphs.block(1, key.sublayers), block_inputs(graphs, key)
    fc1 = Quantised(
        source.integers(-128, 128, inputs["fc1"].shape, np.int8),
        source.random(len(inputs["fc1"]), np.float32) / 100,
    )
    own = graph.arrays(graphs.tensors)
    quantised = graph.model({**own, "fc1": fc1})
    checked(quantised)
    assert "fc1" not in [value.name for value in onnx.load_from_string(quantised).graph.input]
    taken = {name: value for name, value in inputs.items() if name in ("x", "tokens", "heads", "fc2")}
    wanted = run(graph.model(own), {**taken, "fc1": fc1.dequantised()})
    for found, same in zip(run(quantised, taken), wanted, strict=True):
        np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-4)


def test_values_may_be_left_out_to_be_handed_over(graphs: Graphs) -> None:
    graph = graphs.stem()
    constants = graph.arrays(graphs.tensors)
    model = onnx.load_from_string(graph.model(constants, external=True))
    outside = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    assert outside == set(constants)
    assert len(graph.model(constants, external=True)) < 10_000 < sum(array.nbytes for array in constants.values())
    options = onnxruntime.SessionOptions()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in constants.items()}
    options.add_external_initializers(list(values), list(values.values()))
    data = graph.model(constants, external=True)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    images = random_images(ARCH, 1)
    inside = run(graph.model(constants), {"images": images})
    for found, wanted in zip(session.run(None, {"images": images}), inside, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_constant_that_is_not_there(graphs: Graphs) -> None:
    with pytest.raises(BundleError, match="takes no nothing; export again"):
        graphs.block(1, NONE).model({"nothing": np.zeros(1, np.float32)})


@settings(max_examples=30, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from(["alpha", "axis", "sizes"]),
        st.integers(-(2**63), 2**63 - 1)
        | st.lists(st.integers(-(2**40), 2**40), min_size=1)
        | st.floats(-9, 9, width=32),
    )
)
def test_new_nodes_are_onnxs(values: dict[str, Any]) -> None:
    node = new_node("Gemm", "a", ["x", "", "y"], ["z"], domain="com.microsoft", **values)
    found = onnx.NodeProto.FromString(node.data)
    assert (found.op_type, found.name, found.domain) == ("Gemm", "a", "com.microsoft")
    assert (list(found.input), list(found.output)) == (["x", "", "y"], ["z"])
    assert {a.name: onnx.helper.get_attribute_value(a) for a in found.attribute} == values


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), at=st.integers(0), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_graphs_are_refused_in_one_line(
    data: bytes, at: int, byte: int, cut: bool, graphs: Graphs, tiny_bundle: Path
) -> None:
    whole = bytearray((tiny_bundle / stored_files(tiny_bundle)["blocks.1.mlp"]).read_bytes())
    at %= len(whole)
    if cut:
        del whole[at:]
    else:
        whole[at] = byte
    for damaged in (data, bytes(whole)):
        with suppress(BundleError):
            GraphReader(graphs.tensors, WEIGHTS, graphs.files.opset).read(damaged, "a/graph.onnx")
