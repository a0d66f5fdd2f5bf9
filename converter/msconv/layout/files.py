"""The artifact's weight files: their names, the bytes of their headers, and where each tensor lies in them."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from msconv_runtime.dtypes import DTYPES

PART_BYTES = 8 << 30  # one rank's weights are split into files of about this size


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of every rank's files.  `begin` counts from the end of the header of file `file`;
    `parts` are the bytes of what it was joined from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    begin: int
    parts: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.parts)


@dataclass(frozen=True, slots=True)
class OutFile:
    """File number `index` of every rank: its header bytes and its whole size."""

    header: bytes
    size: int


def file_name(rank: int, index: int) -> str:
    return f"weights/model-rank-{rank}-part-{index}.safetensors"


def place(
    tensors: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]], part_bytes: int
) -> tuple[tuple[OutTensor, ...], tuple[OutFile, ...]]:
    """(name, element type, shape, bytes of its parts) of each tensor -> where they lie, and the files."""
    placed: list[OutTensor] = []
    ends: list[int] = [0]
    for name, dtype, shape, parts in tensors:
        if ends[-1] and ends[-1] + sum(parts) > part_bytes:
            ends.append(0)
        placed.append(OutTensor(name, dtype, shape, len(ends) - 1, ends[-1], parts))
        ends[-1] += sum(parts)
    files = []
    for index, end in enumerate(ends):
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for t in placed:
            if t.file == index:
                entries[t.name] = {
                    "dtype": DTYPES[t.dtype].code,
                    "shape": list(t.shape),
                    "data_offsets": [t.begin, t.begin + t.nbytes],
                }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)  # data starts 64-byte aligned
        header = struct.pack("<Q", len(text)) + text
        files.append(OutFile(header, len(header) + end))
    return tuple(placed), tuple(files)
