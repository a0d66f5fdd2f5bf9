"""The places a source goes to: one part of one rank's file each, written in order and hashed on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..layout.cuts import Box
from ..layout.plan import Move, Plan
from .outputs import Outputs

_ZEROS = bytes(1 << 16)


@dataclass(slots=True)
class RankPart:
    """Where one rank's part goes, and how far it has been written.  `key`: (tensor, part, rank)."""

    rank: int
    file: int
    offset: int
    nbytes: int
    boxes: tuple[Box, ...]
    dtype: str
    key: tuple[int, int, int]
    order: NDArray[np.intp] | None
    hash: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    written: int = 0

    def write(self, piece: NDArray[np.uint8], outputs: Outputs) -> None:
        """The next bytes of the part."""
        outputs.write(self.rank, self.file, self.offset + self.written, piece.data)
        self.hash.update(piece.data)
        self.written += len(piece)

    def digest(self) -> str:
        """Of the whole part, with the zeros that pad it."""
        pad_hash(self.hash, self.nbytes - self.written)
        return "xxh3:" + self.hash.hexdigest()


def rank_parts(plan: Plan, name: str, move: Move) -> list[RankPart]:
    """One for each rank that gets this move's bytes."""
    tensor = plan.tensors[move.tensor]
    offset = plan.part_offset(move)
    order = plan.row_order(move)
    return [
        RankPart(
            rank=rank,
            file=tensor.file,
            offset=offset,
            nbytes=tensor.parts[move.part],
            boxes=plan.boxes(name, move, rank),
            dtype=tensor.dtype,
            key=(move.tensor, move.part, rank),
            order=order,
        )
        for rank in plan.ranks(move)
    ]


def pad_hash(hasher: xxhash.xxh3_128, zeros: int) -> None:
    """What was not written is zeros (files are preallocated): rows that pad the last ranks."""
    while zeros > 0:
        n = min(zeros, len(_ZEROS))
        hasher.update(_ZEROS[:n])
        zeros -= n
