"""How much memory a worker needs for a plan, and that memory."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from msconv_runtime.dtypes import DTYPES

from ..layout.cuts import matrix
from ..layout.plan import Plan
from ..quant.kernels import memory_bytes

ENCODED_BYTES = 4  # values are encoded from float32


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """Bytes of a worker's buffers: what is read at once, and what is worked on at once.  `loops`: what the loops
    of decoding and transposing take besides, once, and `tables` of a worker."""

    raw: int
    chunk: int
    loops: int = 0
    tables: int = 0

    def total(self, jobs: int) -> int:
        return self.loops + jobs * (self.raw + 2 * self.chunk + self.tables)


class Buffers:
    """One worker's memory: `raw` takes what is read, `decoded` it in the output's type, `cut` what a rank gets."""

    def __init__(self, sizes: BufferSizes) -> None:
        # mmap, not bytearray: pages are returned to the system when it is closed
        self.chunk_bytes = sizes.chunk
        self.raw = np.frombuffer(mmap.mmap(-1, sizes.raw), np.uint8)
        self.decoded = np.frombuffer(mmap.mmap(-1, sizes.chunk), np.uint8)
        self.cut = np.frombuffer(mmap.mmap(-1, sizes.chunk), np.uint8)


def buffer_sizes(plan: Plan, least: int = 1) -> BufferSizes:
    """Chunks of `least` bytes, or what the plan cannot do without: the widest row (or head, where rows change
    places within it).  The largest unit that is transposed is read whole."""
    chunk, raw = least, 1
    for unit in plan.units:
        for name in unit:
            info, move = plan.sources[name], plan.moves[name][0]
            item = max(DTYPES[info.dtype].nbytes, DTYPES[plan.tensors[move.tensor].dtype].nbytes)
            if name in plan.encoded:  # through float32
                item = ENCODED_BYTES
                chunk = max(chunk, matrix(info.shape)[1] * item)
            if move.is_transposed:
                chunk = max(chunk, plan.part_matrix(move)[1] * item)
                raw = max(raw, sum(plan.sources[n].nbytes for n in unit))
            else:
                chunk = max(chunk, matrix(info.shape)[1] * item * rows_together(plan, name))
    decoded = [name for name in plan.moves if plan.is_decoded(name)]
    has_loops = (
        decoded or plan.encoded or any(move.is_transposed for moves in plan.moves.values() for move in moves)
    )
    tables = max((_decoder_bytes(plan, name, chunk) for name in decoded), default=0)
    return BufferSizes(max(raw, chunk), chunk, memory_bytes() if has_loops else 0, tables)


def rows_together(plan: Plan, name: str) -> int:
    """How many rows have to be moved at once: those of a head, where they change places within it."""
    return max((len(o) for m in plan.moves[name] if (o := plan.row_order(m)) is not None), default=1)


def _decoder_bytes(plan: Plan, name: str, chunk: int) -> int:
    is_transposed = plan.moves[name][0].is_transposed and name not in plan.encoded
    return plan.formats[name].decoder_bytes(plan.sources[name].shape, chunk, is_transposed)
