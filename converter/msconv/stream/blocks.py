"""Moving one source tensor: read a block of rows once, cut it for every rank, cast, hash, write."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from numpy.typing import NDArray

from msconv_runtime.errors import CheckpointError

from ..layout import dtypes
from ..layout.cuts import Box, matrix
from ..layout.plan import Move, Plan
from .outputs import Outputs
from .source import Source

NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_ZEROS = bytes(1 << 16)


class Stopped(Exception):
    """Another thread asked to stop."""


class Buffers:
    """One worker's memory: `block` takes source rows, `cut` what a rank gets of them."""

    def __init__(self, block_bytes: int) -> None:
        # mmap, not bytearray: pages are returned to the system when it is closed
        self.block = np.frombuffer(mmap.mmap(-1, block_bytes), np.uint8)
        self.cut = np.frombuffer(mmap.mmap(-1, 2 * block_bytes), np.uint8)  # 2x: float16 may become float32


@dataclass(frozen=True, slots=True)
class Moved:
    """A source tensor that is in all its places.  `parts[(tensor, part)]` = digest per rank."""

    name: str
    source_digest: str
    parts: dict[tuple[int, int], list[str]]


@dataclass(slots=True)
class _Target:
    """Where one rank's part of this tensor goes, and how far it has been written."""

    rank: int
    file: int
    offset: int
    nbytes: int
    boxes: tuple[Box, ...]
    dtype: str
    hash: xxhash.xxh3_128
    key: tuple[int, int]
    written: int = 0


def largest_row(plan: Plan) -> int:
    """Bytes of the widest row of any source tensor: the smallest block that works."""
    return max(
        (matrix(plan.sources[n].shape)[1] * dtypes.SIZES[plan.sources[n].dtype] for n in plan.moves),
        default=1,
    )


def move_tensor(
    plan: Plan,
    name: str,
    source: Source,
    outputs: Outputs,
    buffers: Buffers,
    advance: Callable[[int], None],
    stopped: Callable[[], bool],
) -> Moved:
    """Bring one source tensor to all its places.  `advance(bytes read)` after each block."""
    info = plan.sources[name]
    rows, cols = matrix(info.shape)
    pitch = cols * dtypes.SIZES[info.dtype]
    targets = [t for move in plan.moves[name] for t in _targets(plan, name, move)]
    step = max(1, len(buffers.block) // max(1, pitch))
    source_hash = xxhash.xxh3_128()
    for row in range(0, rows if pitch else 0, step):
        if stopped():
            raise Stopped
        count = min(step, rows - row)
        block = buffers.block[: count * pitch]
        source.read(info, row * pitch, block.data)
        source_hash.update(block.data)
        for target in targets:
            for box in target.boxes:
                top, bottom = max(row, box.row), min(row + count, box.row + box.rows)
                if top < bottom:
                    piece = _cut(block, info.dtype, cols, top - row, bottom - row, box, target, buffers, name)
                    outputs.write(target.rank, target.file, target.offset + target.written, piece.data)
                    target.hash.update(piece.data)
                    target.written += len(piece)
        advance(len(block))
    source.release(info)
    parts: dict[tuple[int, int], list[str]] = {}
    for target in targets:
        pad_hash(target.hash, target.nbytes - target.written)
        parts.setdefault(target.key, []).append("xxh3:" + target.hash.hexdigest())
    return Moved(name, "xxh3:" + source_hash.hexdigest(), parts)


def _targets(plan: Plan, name: str, move: Move) -> list[_Target]:
    tensor = plan.tensors[move.tensor]
    offset = plan.part_offset(move)
    return [
        _Target(
            rank,
            tensor.file,
            offset,
            tensor.parts[move.part],
            plan.boxes(name, move, rank),
            tensor.dtype,
            xxhash.xxh3_128(),
            (move.tensor, move.part),
        )
        for rank in plan.mesh.ranks
    ]


def _cut(
    block: NDArray[np.uint8],
    dtype: str,
    cols: int,
    top: int,
    bottom: int,
    box: Box,
    target: _Target,
    buffers: Buffers,
    name: str,
) -> NDArray[np.uint8]:
    """Rows [top, bottom) and the box's columns of the block, in the target's type, as contiguous bytes."""
    item = dtypes.SIZES[dtype]
    pitch = cols * item
    if dtype == target.dtype:
        if box.cols == cols:
            return block[top * pitch : bottom * pitch]
        word = next(w for w in (8, 4, 2, 1) if not (pitch % w or box.col * item % w or box.cols * item % w))
        view = block.view(f"u{word}").reshape(-1, pitch // word)
        first, width = box.col * item // word, box.cols * item // word
        size = (bottom - top) * width
        out = buffers.cut[: size * word].view(f"u{word}").reshape(bottom - top, width)
        np.copyto(out, view[top:bottom, first : first + width])
        return buffers.cut[: size * word]
    wide = block.view(NUMPY[dtype]).reshape(-1, cols)[top:bottom, box.col : box.col + box.cols]
    size = wide.size * dtypes.SIZES[target.dtype]
    cast = buffers.cut[:size].view(NUMPY[target.dtype]).reshape(wide.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(cast, wide, casting="unsafe")
    if target.dtype == "float16":
        lost = int(np.isinf(cast).sum()) - int(np.isinf(wide).sum())
        if lost:
            raise CheckpointError(
                f"{name}: {lost} values are beyond float16's range (largest 65504).",
                "Convert with --dtype bfloat16 or float32.",
            )
    return buffers.cut[:size]


def pad_hash(hasher: xxhash.xxh3_128, zeros: int) -> None:
    """What was not written is zeros (files are preallocated): rows that pad the last ranks."""
    while zeros > 0:
        n = min(zeros, len(_ZEROS))
        hasher.update(_ZEROS[:n])
        zeros -= n
