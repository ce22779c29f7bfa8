"""Graphs and weights whose hashes are right, but that no export writes: refused before a backend sees them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import edit_weights, read_whole, rewrite_stored, stored_files
from onnx import TensorProto, helper, numpy_helper

from adavit.bundle.bundle import Bundle
from adavit.bundle.graph_keys import PARTS, GraphKey, read_graph
from adavit.bundle.graphs import Graphs
from adavit.errors import BundleError

Model = onnx.ModelProto


def fault(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        read_whole(bundle)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def altered(bundle: Path, change: Callable[[Model], None], name: str = "stem") -> str:
    file = stored_files(bundle)[name]
    model = onnx.load(bundle / file, load_external_data=False)
    change(model)
    rewrite_stored(bundle, file, model.SerializeToString())
    return fault(bundle)


def weight_of(model: Model) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def constant_of(model: Model) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if not tensor.external_data)


def node_of(model: Model, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


PLACES: list[tuple[dict[str, str | None], str]] = [
    ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"}, "not in model.safetensors"),
    ({"location": "weights-outside.bin", "offset": "0"}, "not in model.safetensors"),
    ({"location": "../fp32/model.safetensors"}, "not in model.safetensors"),
    ({"location": "./model.safetensors"}, "not in model.safetensors"),
    ({"location": "/etc/passwd"}, "not in model.safetensors"),
    ({"location": "model.safetensors\0"}, "not in model.safetensors"),
    ({"location": ""}, "not in model.safetensors"),
    ({"offset": "0"}, "is no tensor of model.safetensors"),
    ({"offset": "1"}, "is no tensor of model.safetensors"),
    ({"offset": "-8"}, "not in model.safetensors"),
    ({"offset": "0x10"}, "not in model.safetensors"),
    ({"offset": str(1 << 64)}, "is no tensor of model.safetensors"),
    ({"offset": "9" * 5000}, "is no tensor of model.safetensors"),
    ({"offset": None}, "is no location, offset and length"),
    ({"length": None}, "is no location, offset and length"),
    ({"length": "4"}, "has another size"),
    ({"length": "04"}, "has another size"),
    ({"checksum": "0"}, "is no location, offset and length"),
    ({"basepath": "/"}, "is no location, offset and length"),
]


@pytest.mark.parametrize(("place", "message"), PLACES)
def test_a_reference_to_anything_but_a_tensor(place: dict[str, str | None], message: str, bundle: Path) -> None:
    def change(model: Model) -> None:
        tensor = weight_of(model)
        entries = {entry.key: entry.value for entry in tensor.external_data} | place
        del tensor.external_data[:]
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    assert message in altered(bundle, change)


@pytest.mark.parametrize("dims", [[], [-1], [1 << 40], [1 << 32, 1 << 32], [0], [1] * 9])
def test_a_reference_of_another_shape(dims: list[int], bundle: Path) -> None:
    def change(model: Model) -> None:
        del weight_of(model).dims[:]
        weight_of(model).dims.extend(dims)

    assert "is not a graph that adavit exports" in altered(bundle, change)


def another_type(model: Model) -> None:
    weight_of(model).data_type = TensorProto.FLOAT16


def repeated_place(model: Model) -> None:
    weight_of(model).external_data.add(key="location", value="elsewhere")


def typed_data(model: Model) -> None:
    constant_of(model).int64_data.append(1)


def strings(model: Model) -> None:
    constant_of(model).data_type = TensorProto.STRING


def named_alike(model: Model) -> None:
    model.graph.initializer.add().CopyFrom(constant_of(model))


def sparse(model: Model) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(constant_of(model))


def shadowed(model: Model) -> None:
    name = weight_of(model).name
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))


def more_data(model: Model) -> None:
    constant_of(model).raw_data += b"\0" * 8


def large_constant(model: Model) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(5000, np.float32), "large"))


def function(model: Model) -> None:
    model.functions.add().name = "evil"


def domain(model: Model) -> None:
    model.opset_import.add().domain = "com.microsoft"


def no_opset(model: Model) -> None:
    del model.opset_import[:]


def other_opset(model: Model) -> None:
    model.opset_import[0].version = 1 << 62


def foreign_node(model: Model) -> None:
    node_of(model, "Concat").domain = "com.microsoft"


def overloaded(model: Model) -> None:
    node_of(model, "Concat").overload = "1"


def custom(model: Model) -> None:
    node_of(model, "Concat").op_type = "PyOp"


def loop(model: Model) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["z"], body=body))


def subgraph(model: Model) -> None:
    node_of(model, "Concat").attribute.append(helper.make_attribute("body", helper.make_graph([], "body", [], [])))


def text_attribute(model: Model) -> None:
    node_of(model, "Conv").attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))


def unknown_attribute(model: Model) -> None:
    node_of(model, "Conv").attribute.append(helper.make_attribute("group", 1))


def attribute_of_another_type(model: Model) -> None:
    attribute = next(entry for entry in node_of(model, "Conv").attribute if entry.name == "strides")
    attribute.CopyFrom(helper.make_attribute("strides", 8))


def attribute_by_reference(model: Model) -> None:
    node_of(model, "Conv").attribute[0].ref_attr_name = "x"


def attribute_twice(model: Model) -> None:
    node = node_of(model, "Conv")
    node.attribute.add().CopyFrom(node.attribute[0])


def made_twice(model: Model) -> None:
    model.graph.node.append(model.graph.node[0])


def read_before(model: Model) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))


def more_inputs(model: Model) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def more_outputs(model: Model) -> None:
    model.graph.output.append(helper.make_tensor_value_info(model.graph.node[0].output[0], TensorProto.FLOAT, [1]))


def training(model: Model) -> None:
    model.training_info.add().algorithm.name = "x"


def notes(model: Model) -> None:
    model.metadata_props.add(key="a", value="b")


CHANGES: list[tuple[Callable[[Model], None], str]] = [
    (another_type, "is no tensor of"),
    (repeated_place, "is no location, offset and length"),
    (typed_data, "a field 7"),
    (strings, "has an unknown type"),
    (named_alike, "two constants have one name"),
    (sparse, "a field 15"),
    (shadowed, "twice"),
    (more_data, "bytes for a size of"),
    (large_constant, "bytes for a size of"),
    (function, "a field 25"),
    (domain, "other operator sets"),
    (no_opset, "other operator sets"),
    (other_opset, "other operator sets"),
    (foreign_node, "a field 7"),
    (overloaded, "a field 8"),
    (custom, "an operator 'PyOp'"),
    (loop, "an operator 'Loop'"),
    (subgraph, "a field 6"),
    (text_attribute, "a field 4"),
    (unknown_attribute, "an attribute 'group'"),
    (attribute_of_another_type, "of another type"),
    (attribute_by_reference, "a field 21"),
    (attribute_twice, "an attribute twice"),
    (made_twice, "twice"),
    (read_before, "which nothing makes before"),
    (more_inputs, "takes or makes other values"),
    (more_outputs, "takes or makes other values"),
    (training, "a field 20"),
    (notes, "a field 14"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_no_export_writes(change: Callable[[Model], None], message: str, bundle: Path) -> None:
    assert message in altered(bundle, change)


def attribute(op: str, name: str, value: Any) -> Callable[[Model], None]:
    """Sets an attribute of the first operator of a type."""

    def change(model: Model) -> None:
        node = node_of(model, op)
        kept = [entry for entry in node.attribute if entry.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def constant(op: str, position: int, *values: int) -> Callable[[Model], None]:
    """Replaces whole numbers that an operator takes."""

    def change(model: Model) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), "evil"))
        node_of(model, op).input[position] = "evil"

    return change


def square(model: Model) -> None:
    """Products of a column and a row: ever larger values of no large constant."""
    column = np.array([-1, 1], np.int64), np.array([1, -1], np.int64)
    for name, value in zip(("column", "row"), column, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    made = [
        helper.make_node("Reshape", ["images", "column"], ["a"]),
        helper.make_node("Reshape", ["images", "row"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["c"]),
    ]
    model.graph.node.extend(made)


def slow(model: Model) -> None:
    """Values of a usual size that take hours."""
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1024, 1), np.float32), "z"))
    model.graph.node.append(helper.make_node("Transpose", ["z"], ["t"], perm=[1, 0]))
    model.graph.node.append(helper.make_node("MatMul", ["z", "t"], ["m0"]))
    for number in range(2000):
        model.graph.node.append(helper.make_node("MatMul", [f"m{number}", "m0"], [f"m{number + 1}"]))


SHAPES: list[tuple[str, Callable[[Model], None], str]] = [
    ("stem", constant("Expand", 1, 1 << 20, 1 << 20, 48), "takes more memory"),
    ("stem", constant("Expand", 1, 1 << 40, 1, 48), "takes more memory"),
    ("stem", constant("Expand", 1, 1 << 62, 1, 48), "'evil' holds numbers beyond 1099511627776"),
    ("stem", constant("Expand", 1, -1, 1, 48), "operator Expand does not fit"),
    ("stem", constant("Expand", 1, 0, 1, 48), "operator Expand does not fit"),
    ("stem", constant("Reshape", 1, 0, 47, -1), "operator Reshape does not fit"),
    ("stem", constant("Reshape", 1, -1, -1), "operator Reshape does not fit"),
    ("stem", constant("Reshape", 1, 1 << 40, -1), "operator Reshape does not fit"),
    ("stem", constant("Reshape", 1, *[1] * 300, -1), "operator Reshape does not fit"),
    ("stem", constant("Reshape", 1), "'evil' has an unknown type or the shape"),
    ("stem", constant("Squeeze", 1, 7), "operator Squeeze does not fit"),
    ("blocks.0.both", constant("Slice", 2, 1 << 40), "operator Slice does not fit"),
    ("blocks.0.both", constant("Slice", 1, -(1 << 40)), "operator Slice does not fit"),
    ("blocks.0.both", constant("Slice", 1, -(1 << 63)), "'evil' holds numbers beyond"),
    ("stem", attribute("Conv", "strides", [0, 0]), "operator Conv does not fit"),
    ("stem", attribute("Conv", "strides", [1, 1]), "does not fit"),
    ("stem", attribute("Conv", "strides", [-8, -8]), "operator Conv does not fit"),
    ("stem", attribute("Conv", "pads", [1 << 40] * 4), "operator Conv does not fit"),
    ("stem", attribute("Conv", "pads", [1 << 40]), "operator Conv does not fit"),
    ("stem", attribute("Conv", "kernel_shape", [1 << 30, 1 << 30]), "operator Conv does not fit"),
    ("stem", attribute("Transpose", "perm", [0, 0, 0]), "operator Transpose does not fit"),
    ("stem", attribute("Transpose", "perm", [0, 1, 9]), "operator Transpose does not fit"),
    ("stem", attribute("Concat", "axis", 1 << 40), "operator Concat does not fit"),
    ("stem", attribute("LayerNormalization", "axis", -(1 << 63)), "operator LayerNormalization does not fit"),
    ("stem", square, "operator MatMul takes more memory"),
    ("stem", slow, "operator MatMul takes more memory or time"),
    ("blocks.1.both", constant("Unsqueeze", 1, 40), "operator Unsqueeze does not fit"),
    ("blocks.1.both", constant("Gather", 1, 17), "operator Gather does not fit"),
    ("blocks.1.both", constant("Gather", 1, -18), "operator Gather does not fit"),
    ("blocks.1.both", constant("ScatterND", 1, 1 << 40), "operator ScatterND does not fit"),
    ("blocks.1.both", attribute("Gather", "axis", 5), "operator Gather does not fit"),
    ("blocks.1.both", attribute("Softmax", "axis", 5), "operator Softmax does not fit"),
    ("blocks.1.both", attribute("Gemm", "transB", 0), "operator Gemm does not fit"),
    ("dense", attribute("Gather", "axis", 0), "its output 'logits' is"),
]


@pytest.mark.parametrize(("name", "change", "message"), SHAPES)
def test_shapes_that_do_not_fit(name: str, change: Callable[[Model], None], message: str, bundle: Path) -> None:
    assert message in altered(bundle, change, name)


def test_row_numbers_that_are_computed(bundle: Path) -> None:
    """A backend may write wherever they say."""

    def change(model: Model) -> None:
        index = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Gather")
        model.graph.node[index].input[1] = "sum"
        model.graph.node.insert(index, helper.make_node("Add", ["tokens", "tokens"], ["sum"]))

    assert "operator Gather does not fit" in altered(bundle, change, "blocks.1.both")


def without(model: Model, clamp: onnx.NodeProto) -> None:
    """Takes an operator out: what reads its value reads its first input."""
    for node in model.graph.node:
        node.input[:] = [clamp.input[0] if name == clamp.output[0] else name for name in node.input]
    model.graph.node.remove(clamp)


def row_clamps(model: Model) -> list[onnx.NodeProto]:
    """What keeps the numbers of rows within bounds."""
    return [node for node in model.graph.node if node.op_type == "Min"]


@pytest.mark.parametrize("number", range(8))
def test_row_numbers_of_batches_that_nothing_bounds(number: int, bundle: Path) -> None:
    def change(model: Model) -> None:
        assert len(row_clamps(model)) == 8
        without(model, row_clamps(model)[number])

    found = altered(bundle, change, "batch.1")
    assert "operator Gather does not fit" in found or "operator ScatterND does not fit" in found


def later(op: str, which: int) -> Callable[[Model], None]:
    """An operator takes rows whose numbers are larger by one."""

    def change(model: Model) -> None:
        index = [i for i, node in enumerate(model.graph.node) if node.op_type == op][which]
        node = model.graph.node[index]
        model.graph.initializer.append(numpy_helper.from_array(np.int64(1), "one_more"))
        model.graph.node.insert(index, helper.make_node("Add", [node.input[1], "one_more"], ["further"]))
        model.graph.node[index + 1].input[1] = "further"

    return change


def made(output: str, *values: int) -> Callable[[Model], None]:
    """An output holds these numbers."""

    def change(model: Model) -> None:
        node = next(node for node in model.graph.node if output in node.output)
        node.output[0] = "before"
        for other in model.graph.node:
            other.input[:] = ["before" if name == output else name for name in other.input]
        array = np.array(values, np.int64)
        model.graph.initializer.append(numpy_helper.from_array(array, "evil"))
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), "nought"))
        at = helper.make_node("Mul", ["before", "nought"], ["none"])
        model.graph.node.extend([at, helper.make_node("Add", ["none", "evil"], [output])])

    return change


def bool_of_bytes(model: Model) -> None:
    """True as 255, which a cast may make 255 of."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.BOOL)
    tensor.raw_data = b"\xff" * len(tensor.raw_data)


def other_part(model: Model) -> None:
    """The value between attention and MLP is another one."""
    for node in model.graph.node:
        node.output[:] = ["moved" if name == "x_between" else name for name in node.output]
        node.input[:] = ["moved" if name == "x_between" else name for name in node.input]


def counts_between(model: Model) -> None:
    """What is between attention and MLP are states, by the name of rows."""
    other_part(model)
    for node in model.graph.node:
        node.output[:] = ["x_between" if name == "state_between" else name for name in node.output]
        node.input[:] = ["x_between" if name == "state_between" else name for name in node.input]


BATCHES: list[tuple[str, Callable[[Model], None], str]] = [
    ("batch.1", later("Gather", 0), "operator Gather does not fit"),
    ("batch.1", later("ScatterND", -1), "operator ScatterND does not fit"),
    ("batch.1", constant("CumSum", 1, 0), "operator CumSum does not fit"),
    ("batch.1", attribute("CumSum", "exclusive", 2), "operator CumSum does not fit"),
    ("batch.1", constant("Div", 1, 0), "operator Div does not fit"),
    ("batch.1", made("next_sizes", 1 << 39), "its output 'next_sizes' may be beyond 17"),
    ("batch.stem", made("next_sizes", 1 << 39), "its output 'next_sizes' may be beyond 17"),
    ("batch.1", made("next_sizes", -1), "its output 'next_sizes' may be beyond 17"),
    ("batch.stem", made("next_state", 3), "its output 'next_state' may be beyond 2"),
    ("batch.2", made("next_state", -1), "its output 'next_state' may be beyond 2"),
    ("batch.1", made("next_sizes", 1, 2), "does not fit its inputs"),
    ("batch.1", bool_of_bytes, "is neither true nor false"),
]


@pytest.mark.parametrize(("name", "change", "message"), BATCHES)
def test_batches_that_do_not_fit(name: str, change: Callable[[Model], None], message: str, bundle: Path) -> None:
    assert message in altered(bundle, change, name)


@pytest.mark.parametrize("change", [other_part, counts_between])
def test_blocks_that_have_no_such_parts(change: Callable[[Model], None], bundle: Path) -> None:
    file = stored_files(bundle)["batch.1"]
    model = onnx.load(bundle / file, load_external_data=False)
    change(model)
    rewrite_stored(bundle, file, model.SerializeToString())
    graphs = Graphs(Bundle.open(bundle))
    read_graph(graphs, GraphKey("block", 1))
    for part in PARTS[:2]:
        with pytest.raises(BundleError, match=r"makes no |is not a graph of its architecture") as caught:
            read_graph(graphs, GraphKey("block", 1, part))
        assert "\n" not in str(caught.value)
    read_graph(graphs, GraphKey("block", 1, PARTS[2]))


def test_outputs_of_other_shapes(bundle: Path) -> None:
    def change(model: Model) -> None:
        node = next(node for node in model.graph.node if "y" in node.output)
        node.output[0] = "before"
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "flat"))
        model.graph.node.append(helper.make_node("Reshape", ["before", "flat"], ["y"]))
        order = [node for node in model.graph.node if node.output[0] != "y"]
        users = [node for node in order if "y" in node.input]
        for node in users:
            node.input[list(node.input).index("y")] = "before"

    assert "its output 'y' is (816,)" in altered(bundle, change)


def test_weights_of_another_type(bundle: Path) -> None:
    file = bundle / stored_files(bundle)["weights"]
    data = file.read_bytes()
    start = data.index(b'"blocks.1.mlp.fc2.weight":{')
    head = data[start : data.index(b"}", start) + 1]
    changed = head.replace(b'"F32"', b'"F16"').replace(b"[48,80]", b"[96,80]")
    assert len(changed) == len(head) and changed != head
    rewrite_stored(bundle, stored_files(bundle)["weights"], data.replace(head, changed))
    assert "blocks.1.mlp.fc2.weight are float16 [96, 80], not" in fault(bundle)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_decisions_of_weights_that_are_no_numbers(value: float, bundle: Path) -> None:
    edit_weights(bundle, lambda name: "head_select" in name, lambda array: np.full_like(array, value))
    assert "are NaN, infinite or beyond 1e+15" in fault(bundle)


def header_changed(bundle: Path, change: Callable[[str], str]) -> str:
    """Changes the header of the weights' file."""
    file = stored_files(bundle)["weights"]
    data = (bundle / file).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = change(data[8:end].decode()).encode()
    rewrite_stored(bundle, file, len(header).to_bytes(8, "little") + header + data[end:])
    return fault(bundle)


HEADERS: list[tuple[Callable[[str], str], str]] = [
    (lambda text: "[]", "it is no object"),
    (lambda text: "{" * 60000, "the weights' header is damaged"),
    (lambda text: "[" * 100000 + "]" * 100000, "the weights' header is damaged"),
    (lambda text: text[:-1], "the weights' header is damaged"),
    (lambda text: text.replace('"F32"', '"F64"', 1), "has the type"),
    (lambda text: text.replace('"F32"', '["F32"]', 1), "the weights' header is damaged"),
    (lambda text: text.replace('"F32"', '"F16"', 1), "bytes, or none"),
    (lambda text: text.replace('"shape":[', '"shape":[-1,-1,', 1), "has the shape"),
    (lambda text: text.replace('"shape":[', f'"shape":[{1 << 70},0,', 1), "bytes, or none"),
    (lambda text: text.replace('"shape":[', '"shape":[1.0,', 1), "has the shape"),
    (lambda text: text.replace('"shape":[', '"shape":[true,', 1), "has the shape"),
    (lambda text: text.replace('"shape":[', '"shape":[1,1,1,1,1,1,1,1,', 1), "has the shape"),
    (lambda text: text.replace('"shape":[', '"more":1,"shape":[', 1), "has other fields"),
    (lambda text: text.replace('"data_offsets":[', '"data_offsets":[0,', 1), "has the shape"),
    (lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[4,', 1), "bytes, or none"),
    (lambda text: text.replace('"cls_token"', '"pos_embed"', 1), "a key twice"),
    (lambda text: text.rstrip()[:-1], "the weights' header is damaged"),
    (lambda text: text + " ", "lies across its memory's words"),
]


@pytest.mark.parametrize(("change", "message"), HEADERS)
def test_a_header_that_is_wrong(change: Callable[[str], str], message: str, bundle: Path) -> None:
    assert message in header_changed(bundle, change)
