"""Sets of TensorRT engines as a bundle describes and stores them."""

import copy
from pathlib import Path
from typing import Any

import pytest
from cases import read_config, write_config

from adavit.bundle.bundle import Bundle
from adavit.bundle.engine_set import EngineKey, EngineSet, StoredEngine
from adavit.bundle.engine_set_reading import read_engine_set
from adavit.bundle.engine_sets import engine_sets, packed_engine, read_engine
from adavit.bundle.graph_keys import DENSE_GRAPH, STEM_GRAPH, GraphKey
from adavit.errors import BundleError
from adavit.files import sha256

STORED = {"file": "a", "bytes": 1, "unpacked_bytes": 9, "sha256": "0" * 64, "source": "1" * 64}
BLOCK = {"role": "block", "block": 1, **STORED}
ATTENTION = {**BLOCK, "part": "attention"}
SET = {
    "flavour": "tensorrt", "version": "10.3.0", "platform": "linux_x86_64", "compute_capabilities": [87],
    "hardware_compatible": False, "version_compatible": False, "stripped": False, "max_batch": 8,
    "precision": "fp32",
    "engines": [
        {"role": "stem", **STORED}, BLOCK, {**BLOCK, "heads": [0, 2]}, {**ATTENTION, "heads": [0, 2]},
        {"role": "dense", **STORED},
    ],
}  # fmt: skip
BLOCK_1 = GraphKey("block", 1)


def read(**changes: Any) -> EngineSet:
    return read_engine_set("key", {**copy.deepcopy(SET), **changes}, 3)


def test_a_set_has_engines_of_all_heads_and_of_the_usual_ones() -> None:
    found = read()
    assert found.max_batch == 8
    assert {key: stored.heads for key, stored in found.engines.items()} == {
        EngineKey(STEM_GRAPH): None,
        EngineKey(BLOCK_1): None,
        EngineKey(BLOCK_1, usual=True): (0, 2),
        EngineKey(GraphKey("block", 1, "attention"), usual=True): (0, 2),
        EngineKey(DENSE_GRAPH): None,
    }
    assert [key.name for key in found.engines] == [
        "stem", "blocks.1", "blocks.1.usual", "blocks.1.attention.usual", "dense",
    ]  # fmt: skip


def test_a_graph_without_an_engine_of_usual_heads_has_that_of_all() -> None:
    found = read()
    assert found.usual(BLOCK_1) == EngineKey(BLOCK_1, usual=True)
    assert found.usual(STEM_GRAPH) == EngineKey(STEM_GRAPH)


def test_the_fingerprint_is_of_the_heads_too() -> None:
    engines = copy.deepcopy(SET["engines"])
    assert isinstance(engines, list)
    engines[2]["heads"] = [0, 1]
    assert read(engines=engines).fingerprint != read().fingerprint == read().fingerprint


HEADS = [[], None, "0", 0, [True], [0.0], ["0"], [-1], [3], [2, 0], [1, 1], [[0]]]
DAMAGED: dict[str, list[Any]] = {
    "version": ["../../../tmp/evil.1", "10.0/../x", "10.13.0\n", "", "1" * 40, "1.", "10.x", "\u0661.0", 10, None],
    "platform": ["linux/x86", "", 3, "x" * 99],
    "flavour": ["", "tensorrt/..", 1],
    "compute_capabilities": ["86", [True], [86.0], ["86"], [-1], 86, [10**9]],
    "max_batch": [0, -1, 4097, True, "8", 8.0, None],
    "precision": ["fp64", "", None, ["fp32"]],
    "engines": [
        {}, None, [{}], [STORED], ["stem"], [BLOCK, BLOCK],
        *([{**BLOCK, **change}] for change in (
            {"role": "blocks"}, {"role": ["stem"]}, {"block": "1"}, {"block": -1}, {"block": True}, {"part": "both"},
            {"part": 1}, {"bytes": "1"}, {"bytes": 0}, {"unpacked_bytes": None}, {"unpacked_bytes": 0.5},
            {"sha256": "0"}, {"source": None},
        )),
        *([BLOCK, {**BLOCK, "heads": heads}] for heads in HEADS),
        [{**BLOCK, "heads": [0]}], [{**ATTENTION, "heads": [0]}],
        [{"role": "stem", **STORED}, {"role": "stem", **STORED, "heads": [0]}],
    ],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in DAMAGED.items() for value in values])
def test_a_damaged_description_is_refused(tiny_bundle: Path, bundle: Path, field: str, value: object) -> None:
    config = read_config(tiny_bundle)
    config["engine_sets"] = {"one": SET, "other": {**copy.deepcopy(SET), field: value}}
    write_config(bundle, config)
    with pytest.raises(BundleError, match="its engine_sets are damaged"):
        engine_sets(Bundle.open(bundle))
    del config["engine_sets"]["other"][field]
    write_config(bundle, config)
    with pytest.raises(BundleError, match="its engine_sets are damaged"):
        engine_sets(Bundle.open(bundle))


ENGINE = b"a kernel's source, " * 5000


def store(bundle: Path, data: bytes, size: int) -> StoredEngine:
    (bundle / "one.engine").write_bytes(data)
    return StoredEngine("one.engine", len(data), sha256(data), size, "1" * 64)


def test_an_engine_is_packed_and_read_back(bundle: Path) -> None:
    packed = packed_engine(ENGINE)
    assert len(packed) < len(ENGINE) / 10
    assert read_engine(Bundle.open(bundle), store(bundle, packed, len(ENGINE))) == ENGINE


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (ENGINE, len(ENGINE)),
        (b"", len(ENGINE)),
        (packed_engine(ENGINE)[:-1], len(ENGINE)),
        (packed_engine(ENGINE), len(ENGINE) - 1),
        (packed_engine(ENGINE), len(ENGINE) + 1),
        (packed_engine(bytes(1 << 24)), 1),
    ],
)
def test_what_is_no_packed_engine_is_refused(bundle: Path, data: bytes, size: int) -> None:
    with pytest.raises(BundleError, match=r"one\.engine: is no packed engine; build the engines again"):
        read_engine(Bundle.open(bundle), store(bundle, data, size))


def test_an_altered_engine_is_refused(bundle: Path) -> None:
    stored = store(bundle, packed_engine(ENGINE), len(ENGINE))
    (bundle / "one.engine").write_bytes(packed_engine(ENGINE[::-1])[: stored.bytes].ljust(stored.bytes, b"0"))
    with pytest.raises(BundleError, match="altered"):
        read_engine(Bundle.open(bundle), stored)
