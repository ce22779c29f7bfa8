"""ONNX files as bytes: weights read from them, and inputs made weights."""

from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from adavit.errors import BundleError
from adavit.runtime.onnx_file import weights_of, with_fixed_inputs


def a_model() -> bytes:
    """y = x @ w + b, every one of them an input."""
    values = [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", ["K", 3]), ("w", [3, "h"]), ("b", ["h"]))]
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["p"]), onnx.helper.make_node("Add", ["p", "b"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", values, [onnx.helper.make_tensor_value_info("y", 1, ["K", "h"])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@settings(max_examples=30, deadline=None)
@given(heads=st.integers(1, 300), order=st.booleans())
def test_inputs_become_constants(heads: int, order: bool) -> None:
    source = np.random.default_rng(heads)
    w = source.standard_normal((3, heads) if order else (heads, 3), np.float32)
    values = {"w": w if order else w.T, "b": source.standard_normal(heads, np.float32)}
    model = onnx.load_from_string(with_fixed_inputs(a_model(), values))
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["x"]
    assert {tensor.name for tensor in model.graph.initializer} == {"w", "b"}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), values[tensor.name])


def test_all_else_of_a_model_stays() -> None:
    before, after = (onnx.load_from_string(data) for data in (a_model(), with_fixed_inputs(a_model(), {})))
    assert before == after


def test_nodes_get_the_attributes_they_lack() -> None:
    model = onnx.load_from_string(a_model())
    model.graph.node[1].name = "sum"
    changed = with_fixed_inputs(model.SerializeToString(), {}, {"sum": {"count": 300, "sizes": [0, 1, 70000]}})
    nodes = onnx.load_from_string(changed).graph.node
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in nodes[1].attribute}
    assert found == {"count": 300, "sizes": [0, 1, 70000]}
    assert (nodes[0], nodes[1].input, nodes[1].op_type) == (model.graph.node[0], ["p", "b"], "Add")


def test_an_input_that_is_not_there() -> None:
    with pytest.raises(BundleError, match="has no input nothing"):
        with_fixed_inputs(a_model(), {"nothing": np.zeros(1, np.float32)})


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), cut=st.integers(1, 200))
def test_damaged_models_are_refused(data: bytes, cut: int) -> None:
    values = {"w": np.zeros((3, 1), np.float32)}
    with pytest.raises(BundleError):
        with_fixed_inputs(data, values)
    with suppress(BundleError):  # what is cut between two fields is a message still
        with_fixed_inputs(a_model()[:-cut], values)


@settings(max_examples=30, deadline=None)
@given(heads=st.integers(0, 300))
def test_weights_are_read_back(heads: int) -> None:
    w = np.random.default_rng(heads).standard_normal((3, heads), np.float32)
    found = weights_of(with_fixed_inputs(a_model(), {"w": w, "b": np.arange(heads)}))
    assert set(found) == {"w"}  # the others are no float32
    np.testing.assert_array_equal(found["w"], w)


def test_a_weight_of_another_size() -> None:
    model = onnx.load_from_string(with_fixed_inputs(a_model(), {"w": np.zeros((3, 2), np.float32)}))
    model.graph.initializer[0].dims[0] = 4
    with pytest.raises(BundleError, match=r"the weight w is not of the shape \[4, 2\]; export again"):
        weights_of(model.SerializeToString())


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), at=st.integers(0, 300), byte=st.integers(0, 255))
def test_damaged_weights_are_refused_in_one_line(data: bytes, at: int, byte: int) -> None:
    whole = bytearray(with_fixed_inputs(a_model(), {"w": np.ones((3, 5), np.float32)}))
    whole[at % len(whole)] = byte
    for damaged in (data, bytes(whole)):
        with suppress(BundleError):
            assert all(value.dtype == np.float32 for value in weights_of(damaged).values())
