"""The graphs that devices run: their names, their weights, and the parts of blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import export, random_model, tiny

from adavit.bundle.bundle import Bundle
from adavit.bundle.graph_keys import (
    DENSE_GRAPH,
    PARTS,
    STEM_GRAPH,
    GraphKey,
    constants_of,
    graph_keys,
    part_keys,
    read_graph,
)
from adavit.bundle.graphs import Graphs
from adavit.errors import BundleError

ARCH = tiny()
OWN = {"x", "kept", "state", "limits", "numbers", "attention_rows", "attention_images", "attention_tokens", "mlp_rows"}


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Path) -> Graphs:
    return Graphs(Bundle.open(tiny_bundle))


def test_every_graph_has_a_name(graphs: Graphs, plain: tuple[Path, Path]) -> None:
    keys = graph_keys(graphs.files)
    assert keys == [STEM_GRAPH, *(GraphKey("block", number) for number in range(3)), DENSE_GRAPH]
    assert [key.name for key in keys] == ["stem", "blocks.0", "blocks.1", "blocks.2", "dense"]
    assert [key.name for key in part_keys(graphs.files)[:4]] == [
        "blocks.0.attention",
        "blocks.0.mlp",
        "blocks.0.decisions",
        "blocks.1.attention",
    ]
    dense = Graphs(Bundle.open(plain[0])).files
    assert (graph_keys(dense), part_keys(dense)) == ([DENSE_GRAPH], [])


def test_keys_are_written_and_read(graphs: Graphs) -> None:
    for key in (*graph_keys(graphs.files), *part_keys(graphs.files)):
        assert GraphKey.from_dict(key.to_dict()) == key
    assert GraphKey("block", 2, "mlp").to_dict() == {"role": "block", "block": 2, "part": "mlp"}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"role": "head"},
        {"role": "block"},
        {"role": "block", "block": -1},
        {"role": "block", "block": True},
        {"role": "block", "block": "1"},
        {"role": "block", "block": 1, "part": "both"},
        {"role": None, "block": 1},
    ],
)
def test_what_is_no_key(values: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        GraphKey.from_dict(values)


def test_graphs_are_whole_models(graphs: Graphs) -> None:
    for key in (*graph_keys(graphs.files), *part_keys(graphs.files)):
        graph = read_graph(graphs, key)
        constants = constants_of(graphs, key, graph)
        model = onnx.load_from_string(graph.model(constants))
        onnx.checker.check_model(model, full_check=True)
        given = {value.name for value in model.graph.input}
        assert given == {value.name for value in graph.inputs} - set(constants), key.name
        assert given <= OWN | {"images", "y", "x_between", "state_between", "state_behind", "next_state"}, key.name


@pytest.mark.parametrize("block", range(3))
def test_parts_take_what_the_part_before_makes(block: int, graphs: Graphs) -> None:
    attention, mlp, decisions = (read_graph(graphs, GraphKey("block", block, part)) for part in PARTS)
    whole = read_graph(graphs, GraphKey("block", block))
    assert [value.name for value in attention.outputs] == ["x_between", "state_between"]
    assert {value.name for value in mlp.inputs} >= {"x_between", "state_between", "mlp_rows", "kept", "fc1", "fc2"}
    assert not {"x", "state", "qkv", "attention_rows"} & {value.name for value in mlp.inputs}
    assert mlp.outputs[0].name == "y"
    left = {value.name for value in decisions.inputs}
    assert "y" in left and not left & {"x", "x_between", "kept", "numbers", "fc1"}
    made = {value.name for part in (mlp, decisions) for value in part.outputs}
    assert {value.name for value in whole.outputs} <= made
    nodes = [node.data for part in (attention, mlp, decisions) for node in part.nodes]
    assert set(nodes) == {node.data for node in whole.nodes}


@pytest.mark.parametrize("heads", [(0, 1, 2), (1,), (0, 2)])
def test_weights_of_some_heads(heads: tuple[int, ...], graphs: Graphs) -> None:
    key = GraphKey("block", 1)
    found = constants_of(graphs, key, read_graph(graphs, key), heads)
    channels = len(heads) * ARCH.head_width
    shapes = {name: np.shape(found[name]) for name in ("qkv", "qkv_bias", "proj", "heads", "fc1", "fc2")}
    assert shapes == {
        "qkv": (3 * channels, ARCH.width),
        "qkv_bias": (3 * channels,),
        "proj": (ARCH.width, channels),
        "heads": (len(heads),),
        "fc1": (ARCH.hidden, channels),
        "fc2": (ARCH.width, ARCH.hidden),
    }


def test_graphs_that_are_not_there(plain: tuple[Path, Path], tmp_path: Path) -> None:
    dense = Graphs(Bundle.open(plain[0]))
    without = Graphs(Bundle.open(export(random_model(ARCH), tmp_path, with_dense=False, verify=False)))
    missing = [
        (dense, STEM_GRAPH),
        (dense, GraphKey("block", 0)),
        (without, DENSE_GRAPH),
        (without, GraphKey("block", 3)),
    ]
    for graphs, key in missing:
        with pytest.raises(BundleError, match=f"the bundle has no graph {key.name} in fp32; export again"):
            read_graph(graphs, key)
