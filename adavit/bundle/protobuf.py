"""Protocol Buffers as far as ONNX files need them: messages of numbered fields, read strictly and written.

The runtime has no onnx, and needs none. A reader of untrusted files has to see what every other reader sees, so fields
that are not asked for, of another wire type, or twice where one counts, are errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

__all__ = ["BYTES", "FIXED32", "VARINT", "Field", "Fields", "bytes_field", "number_field", "numbers", "read"]

VARINT, BYTES, FIXED32 = 0, 2, 5
"""Wire types."""


class Field(NamedTuple):
    """What a field may be: its wire type, one of the three, and whether it may come several times.

    A repeated number may also come packed, as bytes.
    """

    wire: int
    repeated: bool = False


class Fields(dict[int, list[bytes]]):
    """The contents of a message's fields by number, in order; numbers are their encoded varints."""

    def text(self, number: int) -> str:
        """A string; empty where there is none."""
        return self[number][0].decode() if number in self else ""

    def value(self, number: int, default: int = 0) -> int:
        """A number."""
        return _varint(self[number][0], 0)[0] if number in self else default


def read(message: bytes, known: Mapping[int, Field]) -> Fields:
    """The fields of a message.

    Raises:
        ValueError: it is damaged, or has other fields than those known.
    """
    found = Fields()
    at, end = 0, len(message)
    while at < end:
        tag, at = (message[at], at + 1) if message[at] < 128 else _varint(message, at)  # a call for each takes long
        number, wire = tag >> 3, tag & 7
        field = known.get(number)
        packed = wire == BYTES and field == (VARINT, True)
        if field is None or (wire != field.wire and not packed):
            raise ValueError(f"it has a field {number} of the wire type {wire}, which no export writes")
        if number in found and not field.repeated:
            raise ValueError(f"it has the field {number} twice")
        start = at
        if wire == VARINT:
            _, at = _varint(message, at)
        elif wire == BYTES:
            length, start = (message[at], at + 1) if at < end and message[at] < 128 else _varint(message, at)
            at = start + length
        else:
            at += 4
        if at > end:
            raise ValueError("it ends in the middle of a field")
        found.setdefault(number, []).append(message[start:at])
    return found


def numbers(contents: Iterable[bytes]) -> list[int]:
    """All numbers of a repeated field, packed or not."""
    found = []
    for content in contents:
        at = 0
        while at < len(content):
            value, at = _varint(content, at)
            found.append(value)
    return found


def bytes_field(number: int, content: bytes) -> bytes:
    """A field of bytes, a string or a message, encoded."""
    return _encoded(number << 3 | BYTES) + _encoded(len(content)) + content


def number_field(number: int, value: int) -> bytes:
    """A field of a number, encoded."""
    return _encoded(number << 3 | VARINT) + _encoded(value)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a position, seven bits a byte, and the position behind it."""
    if at < len(message) and message[at] < 128:
        return message[at], at + 1
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("it holds a damaged number")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> 64:
                raise ValueError("it holds a number of more than 64 bits")
            return value, at
        shift += 7


def _encoded(value: int) -> bytes:
    """A number as a varint."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
