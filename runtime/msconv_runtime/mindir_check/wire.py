"""Protocol buffers, read strictly: what the exporter writes has one spelling, and any other is refused.

A second spelling of the same value (fields out of order or doubled, long varints, packed lists) is how two readers
come to see two different files.  https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

VARINT, EIGHT, LENGTH, FOUR = 0, 1, 2, 5  # wire types
WIRE = {"int": VARINT, "float64": EIGHT, "bytes": LENGTH, "text": LENGTH, "span": LENGTH, "bits32": FOUR}
NAMED = {VARINT: "a number", EIGHT: "eight bytes", LENGTH: "bytes with a length", FOUR: "four bytes"}


class Field(NamedTuple):
    """`int`: signed, 64 bits.  `bits32`: four bytes as they are.  `span`: where bytes begin and end, uncopied.
    `many`: a list, in which the field may come any number of times."""

    name: str
    kind: Literal["int", "bits32", "bytes", "text", "span"]
    many: bool = False


Message = Mapping[int, Field]


class Malformed(ValueError):
    """The bytes are no message of this kind in the exporter's spelling."""


def read(data: bytes, message: Message, what: str, begin: int = 0, end: int | None = None) -> dict[str, Any]:
    """Values by field name; what is not there is not in it, lists are never missing.

    Nested messages stay bytes.  Raises Malformed naming `what` and the place."""
    end = len(data) if end is None else end
    found: dict[str, Any] = {field.name: [] for field in message.values() if field.many}
    at, last = begin, 0
    while at < end:
        place = at
        key = data[at]
        at += 1
        if key > 127:
            key, at = varint(data, place, end, what)
        number, wire = key >> 3, key & 7
        field = message.get(number)
        if field is None:
            raise Malformed(f"{what}: has field {number} at byte {place}, which no exported graph has")
        if number < last or (number == last and not field.many):
            raise Malformed(f"{what}: {field.name} at byte {place} is there twice, or out of order")
        last = number
        if wire == LENGTH:
            if at < end and data[at] < 128:
                size = data[at]
                at += 1
            else:
                size, at = varint(data, at, end, what)
            stop = at + size
            if stop > end:
                raise Malformed(f"{what}: {field.name} at byte {place} has {size} bytes, {end - at} are left")
            value: Any = (at, stop) if field.kind == "span" else data[at:stop]
            at = stop
        elif wire == VARINT:
            value, at = varint(data, at, end, what)
        elif wire == FOUR:
            value = data[at : at + 4]
            at += 4
        else:
            raise Malformed(f"{what}: {field.name} at byte {place} has wire type {wire}")
        if WIRE[field.kind] != wire or at > end:
            raise Malformed(f"{what}: {field.name} at byte {place} is not {NAMED[WIRE[field.kind]]}")
        if field.kind == "text":
            value = _text(value, what, field.name)
        elif field.kind == "int" and value >> 63:
            value -= 1 << 64
        if field.many:
            found[field.name].append(value)
        else:
            found[field.name] = value
    return found


def varint(data: bytes, at: int, end: int, what: str) -> tuple[int, int]:
    """An unsigned number of 64 bits in its shortest form, and where it ends."""
    value = shift = 0
    start = at
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if (byte == 0 and shift) or value >> 64:
                break
            return value, at
        shift += 7
        if shift > 63:
            break
    raise Malformed(f"{what}: the number at byte {start} is cut off, too long, or not in its shortest form")


def _text(value: bytes, what: str, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Malformed(f"{what}: {name} is no UTF-8") from None
