"""Reads the description of an engine set in `config.json`; whoever made the bundle wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from adavit.bundle.bundle import PRECISIONS
from adavit.bundle.engine_set import MOST_BATCH, VERSION, EngineKey, EngineSet, StoredEngine
from adavit.bundle.graph_keys import GraphKey
from adavit.errors import shown

__all__ = ["read_engine_set"]

PATTERNS = {
    "key": re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}"),
    "flavour": re.compile(r"[a-z][a-z0-9-]{0,31}"),
    "version": VERSION,
    "platform": re.compile(r"[a-z0-9_]{1,63}"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
}
"""What the texts of a set may be."""


def read_engine_set(key: str, values: Mapping[str, Any], heads: int) -> EngineSet:
    """A set from its description in `config.json`.

    Args:
        key: of the set.
        values: the description.
        heads: of the model.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it describes no set of this model.
    """
    capabilities = values["compute_capabilities"]
    if not all(type(capability) is int and 0 < capability < 10_000 for capability in capabilities):
        raise ValueError(f"compute_capabilities is {str(capabilities)[:80]}")
    return EngineSet(
        _text("key", key),
        _text("flavour", values["flavour"]),
        _text("version", values["version"]),
        _text("platform", values["platform"]),
        tuple(capabilities),
        values["hardware_compatible"] is True,
        values["version_compatible"] is True,
        values["stripped"] is True,
        _max_batch(values["max_batch"]),
        _precision(values["precision"]),
        _engines(values["engines"], heads),
    )


def _precision(value: Any) -> str:
    if value not in PRECISIONS:
        raise ValueError(f"precision is {shown(value)}")
    return str(value)


def _engines(values: Any, heads: int) -> dict[EngineKey, StoredEngine]:
    if not isinstance(values, list):
        raise ValueError("engines is no list")
    found = {EngineKey(GraphKey.from_dict(engine), "heads" in engine): _stored(engine, heads) for engine in values}
    if len(found) != len(values):
        raise ValueError("two engines are of one graph")
    for graph, usual in found:
        if usual and EngineKey(GraphKey("block", graph.block)) not in found:
            raise ValueError(f"{graph.name} has an engine of some heads, and its block none of all")
    return found


def _max_batch(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MOST_BATCH:
        raise ValueError(f"max_batch is {shown(value)}")
    return value


def _stored(values: Mapping[str, Any], heads: int) -> StoredEngine:
    return StoredEngine(
        str(values["file"]),
        _bytes(values["bytes"]),
        _text("sha256", values["sha256"]),
        _bytes(values["unpacked_bytes"]),
        _text("sha256", values["source"]),
        _heads(values["heads"], heads) if "heads" in values else None,
    )


def _bytes(value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError(f"an engine has {shown(value)} bytes")
    return value


def _heads(values: Any, heads: int) -> tuple[int, ...]:
    """The numbers of an engine's heads, ascending."""
    known = isinstance(values, list) and all(type(head) is int and 0 <= head < heads for head in values)
    if not known or not values or any(second <= first for first, second in pairwise(values)):
        raise ValueError(f"an engine has the heads {shown(values)}, of {heads}")
    return tuple(values)


def _text(kind: str, value: Any) -> str:
    """A text of a set, if it is what it may be: some become parts of files' names."""
    if not isinstance(value, str) or not PATTERNS[kind].fullmatch(value):
        raise ValueError(f"{kind} is {shown(value)}")
    return value
