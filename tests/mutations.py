"""Mutations of a bundle's files that know what the files are made of, the same each time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

VARINT, FIXED64, BYTES, GROUP, GROUP_END, FIXED32 = range(6)
Schema = Mapping[int, Any]
_ATTRIBUTE: Schema = {}
_VALUE: Schema = {2: {1: {2: {1: {}}}}}
ONNX: Schema = {7: {1: {5: _ATTRIBUTE}, 5: {13: {}}, 11: _VALUE, 12: _VALUE}, 8: {}}
"""The fields of an ONNX file that are messages themselves, by number."""
OPERATORS = (
    b"Add Sub Mul Div MatMul Gemm Concat Expand Reshape Gather ScatterND Loop If PyOp Sqrt Exp Transpose".split()
)
NUMBERS = [0, 1, 2, 3, 7, 8, 10, 48, 127, 128, (1 << 31) - 1, 1 << 31, (1 << 32) + 1, 1 << 63, (1 << 64) - 1, 1 << 64]
TEXTS = [b"", b"\xff\xfe", b"*/_ORT_MEM_ADDR_/*", b"../x", b"x" * 5000, b"\0", b"0", b"-1", b"tokens", b"x", b"y"]
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 1 << 31, 1 << 70, 1.5, -0.0, 1e300, "", "x", "../x", "\udcff", "\0", "y" * 10000,
    [], {}, [[]], {"a": 1}, "0" * 64, "fp32/stem.onnx", "labels.txt",
]  # fmt: skip


def varint(value: int) -> bytes:
    """A number as Protocol Buffers encode it; of 65 bits too, which they do not have."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


Field = tuple[int, int, Any]
"""Number, wire type, and the number or bytes."""


def fields(data: bytes) -> list[Field]:
    """The fields of a message as it was exported."""
    found: list[Field] = []
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        if tag & 7 == VARINT:
            value, at = _read_varint(data, at)
            found.append((tag >> 3, VARINT, value))
        else:
            length, at = _read_varint(data, at) if tag & 7 == BYTES else (4, at)
            found.append((tag >> 3, tag & 7, data[at : at + length]))
            at += length
    return found


def encoded(found: list[Field]) -> bytes:
    """These fields as a message."""
    parts = []
    for number, wire, value in found:
        content = varint(value) if isinstance(value, int) else varint(len(value)) * (wire == BYTES) + value
        parts.append(varint(number << 3 | wire) + content)
    return b"".join(parts)


def mutated_message(data: bytes, schema: Schema, source: Random) -> bytes:
    """A message with one thing changed, in it or in a message that it holds."""
    found = fields(data)
    if not found:
        return encoded([(source.randrange(1, 30), VARINT, source.choice(NUMBERS))])
    at = source.randrange(len(found))
    number, wire, value = found[at]
    if wire == BYTES and number in schema and source.random() < 0.9:
        found[at] = number, wire, mutated_message(value, schema[number], source)
        return encoded(found)
    other = source.choice(found)
    changes: list[Callable[[], Any]] = [
        lambda: found.pop(at),
        lambda: found.insert(at, found[at]),
        lambda: found.insert(source.randrange(len(found)), found.pop(at)),
        lambda: found.__setitem__(at, (source.randrange(1, 30), wire, value)),
        lambda: found.__setitem__(at, (number, source.randrange(8), value)),
        lambda: found.__setitem__(at, (number, other[1], other[2])),
        lambda: found.append((source.randrange(1, 30), BYTES, source.choice(TEXTS))),
        lambda: found.__setitem__(at, (number, BYTES, b"".join(map(varint, source.choices(NUMBERS, k=3))))),
        *[lambda: found.__setitem__(at, (number, wire, _changed(value, source)))] * 8,
    ]
    source.choice(changes)()
    result = encoded(found)
    return result[: source.randrange(len(result) + 1)] if source.random() < 0.02 else result


def _changed(value: int | bytes, source: Random) -> int | bytes:
    """Another number, or other bytes."""
    if isinstance(value, int):
        return source.choice([*NUMBERS, value + 1, max(value - 1, 0)])
    if value in OPERATORS or source.random() < 0.1:
        return source.choice(OPERATORS)
    place = source.randrange(len(value) + 1)
    flipped = bytes([value[place % len(value)] ^ 1 << source.randrange(8)]) if value else b"\1"
    return source.choice(
        [
            source.choice(TEXTS),
            value[:place],
            value + value[:place],
            value[:place] + flipped + value[place + 1 :],
            (1 << source.randrange(64)).to_bytes(8, "little"),
            str(source.choice(NUMBERS)).encode(),
        ]
    )


def mutated_json(value: Any, source: Random) -> str:
    """JSON text of a value with one thing changed."""
    changed = copy.deepcopy(value)
    places = list(_places(changed))
    parent, key = source.choice(places)
    action = source.randrange(8)
    if action == 0:
        del parent[key]
    elif action == 1:
        other, name = source.choice(places)
        parent[key] = copy.deepcopy(other[name])
    elif action == 2 and isinstance(parent, dict):
        parent[source.choice(["x", "__metadata__", "stem", "dense", "heads", "sha256"])] = source.choice(VALUES)
    elif action == 3:
        deep: Any = []
        for _ in range(source.choice([10, 300, 900])):
            deep = [deep]
        parent[key] = deep
    elif type(parent[key]) is int and action < 6:
        parent[key] += source.choice([-1, 1, 8, -parent[key] * 2])
    else:
        parent[key] = source.choice(VALUES)
    text = json.dumps(changed)
    if source.random() < 0.1:
        at = source.randrange(len(text))
        text = text[:at] + source.choice(["", "NaN", "{", '"', "1e999", "\x00", '"a":1,"a":1,']) + text[at + 1 :]
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: what holds it, and under which key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
