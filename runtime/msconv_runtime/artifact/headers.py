"""A rank file's own table of tensors, its safetensors header, against the manifest's.

Digests are over bytes alone: which bytes are which tensor is only said by these two, and must be the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec

from ..dtypes import DTYPES
from .manifest import TensorEntry

PREFIX = struct.Struct("<Q")  # before the JSON: its length
MAX_HEADER_BYTES = 16 << 20
MOST_LETTERS = 200  # of a name in a file


class _Entry(msgspec.Struct):
    """Of one tensor; all empty for `__metadata__`, which is none."""

    dtype: str = ""
    shape: list[int] = []
    data_offsets: tuple[int, int] = (0, 0)


Table = dict[str, _Entry]


def header_size(entries: Sequence[TensorEntry]) -> int:
    """Bytes before the first of a file's tensors: what a header has at most.  0 if there are no tensors."""
    return min((t.begin for t in entries), default=0)


def differences(header: bytes | memoryview, entries: Sequence[TensorEntry]) -> Iterator[tuple[str, str]]:
    """Name of each tensor of a file that its header tells otherwise than the manifest's `entries`, and what; the
    name is "" if there is no table to read.  `header`: the file's first `header_size` bytes."""
    try:
        (length,) = PREFIX.unpack_from(header)
        table = msgspec.json.decode(header[PREFIX.size : PREFIX.size + length], type=Table)
    except (struct.error, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        yield "", "its header is no table of tensors"
        return
    base = PREFIX.size + length
    table.pop("__metadata__", None)
    for entry in entries:
        if entry.name not in table:
            yield entry.name, "is in the manifest, and not in the file's header"
        elif wrong := _difference(table.pop(entry.name), entry, base):
            yield entry.name, wrong
    for name in table:
        yield name[:MOST_LETTERS], "is in the file's header, and not in the manifest"


def _difference(found: _Entry, entry: TensorEntry, base: int) -> str:
    """What the header says of a tensor, and what the manifest; "" if it is the same."""
    code = DTYPES[entry.dtype].code
    begin, end = (base + offset for offset in found.data_offsets)
    for what, its, wanted in (
        ("element type", found.dtype[:40], code),
        ("shape", found.shape[:9], entry.shape[:9]),
        ("place, from byte to byte,", [begin, end], [entry.begin, entry.begin + entry.nbytes]),
    ):
        if its != wanted:
            return f"its {what} is {its} by the file's header, {wanted} by the manifest"
    return ""
