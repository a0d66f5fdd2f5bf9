"""Other names in a graph: those under which kernels and groups are known here.

Only for bytes that were checked: they have one spelling, so what is not renamed stays as it is, byte for byte.
MindSpore's own reader takes 0.1 s a graph for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .schema import ATTRIBUTE, MODEL, PRIMITIVE
from .wire import EIGHT, FOUR, LENGTH, VARINT, Message, varint

Rename = Callable[[str, str, str], str]
WIDTHS = {EIGHT: 8, FOUR: 4}  # bytes of a value, by wire type


def renamed(data: bytes, rename: Rename) -> bytes:
    """The graph with each text attribute of a primitive as `rename(kind of primitive, attribute, text)` says."""

    def primitive(old: bytes) -> bytes:
        kind = _text(old, _number(PRIMITIVE, "op_type"))

        def attribute(one: bytes) -> bytes:
            name = _text(one, _number(ATTRIBUTE, "name"))
            return _changed(one, _number(ATTRIBUTE, "s"), lambda text: rename(kind, name, text.decode()).encode())

        return _changed(old, _number(PRIMITIVE, "attribute"), attribute)

    return _changed(data, _number(MODEL, "primitives"), primitive)


def _changed(data: bytes, wanted: int, change: Callable[[bytes], bytes]) -> bytes:
    """The message with every field of this number, bytes with a length, as `change` makes it."""
    pieces: list[bytes] = []
    kept = 0
    for number, key, begin, end in _fields(data):
        if number == wanted and (new := change(old := data[begin:end])) != old:
            pieces += [data[kept:key], _varint(number << 3 | LENGTH), _varint(len(new)), new]
            kept = end
    return b"".join([*pieces, data[kept:]])


def _text(data: bytes, wanted: int) -> str:
    return next((data[begin:end].decode() for number, _, begin, end in _fields(data) if number == wanted), "")


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(number, where the field begins, where its value begins, where it ends) of each."""
    at = 0
    while at < len(data):
        place = at
        key, at = varint(data, at, len(data), "a field")
        wire = key & 7
        if wire == LENGTH:
            size, at = varint(data, at, len(data), "a length")
            end = at + size
        elif wire == VARINT:
            _, end = varint(data, at, len(data), "a number")
        else:
            end = at + WIDTHS[wire]
        yield key >> 3, place, at, end
        at = end


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _number(message: Message, name: str) -> int:
    return next(number for number, field in message.items() if field.name == name)
