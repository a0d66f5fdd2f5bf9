"""Moving source tensors: read once, dequantise, cut for every rank, turn over, cast, hash, write."""

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
from ..quant.fp8 import Blocks, count_nan
from ..quant.kernels import memory_bytes, turn
from .outputs import Outputs
from .source import Source

NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
TABLE_BYTES = 256 * 12  # of a block, while it is made: float32 products and the output's type
LARGEST = {"float16": "65504", "bfloat16": "3.4e38", "float32": "3.4e38"}
_ZEROS = bytes(1 << 16)


class Stopped(Exception):
    """Another thread asked to stop."""


class Buffers:
    """One worker's memory: `raw` takes what is read, `wide` it in the output's type, `cut` what a rank gets."""

    def __init__(self, sizes: BufferSizes) -> None:
        # mmap, not bytearray: pages are returned to the system when it is closed
        self.chunk_bytes = sizes.chunk
        self.raw = np.frombuffer(mmap.mmap(-1, sizes.raw), np.uint8)
        self.wide = np.frombuffer(mmap.mmap(-1, sizes.chunk), np.uint8)
        self.cut = np.frombuffer(mmap.mmap(-1, sizes.chunk), np.uint8)


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """Bytes of a worker's buffers: what is read at once, and what is worked on at once.  `loops`: what the loops
    of dequantising and turning over take besides, once, and `tables` of a worker."""

    raw: int
    chunk: int
    loops: int = 0
    tables: int = 0

    def total(self, jobs: int) -> int:
        return self.loops + jobs * (self.raw + 2 * self.chunk + self.tables)


@dataclass(frozen=True, slots=True)
class Moved:
    """A source tensor that is in all its places.  `parts[(tensor, part, rank)]` = digest; those of a unit of
    several are with its first."""

    name: str
    source_digest: str
    parts: dict[tuple[int, int, int], str]


@dataclass(slots=True)
class _Target:
    """Where one rank's part goes, and how far it has been written."""

    rank: int
    file: int
    offset: int
    nbytes: int
    boxes: tuple[Box, ...]
    dtype: str
    key: tuple[int, int, int]
    order: NDArray[np.intp] | None
    hash: xxhash.xxh3_128
    written: int = 0

    def write(self, piece: NDArray[np.uint8], outputs: Outputs) -> None:
        """The next bytes of the part."""
        outputs.write(self.rank, self.file, self.offset + self.written, piece.data)
        self.hash.update(piece.data)
        self.written += len(piece)


def buffer_sizes(plan: Plan, least: int = 1) -> BufferSizes:
    """Chunks of `least` bytes, or what the plan cannot do without: the widest row (or head, where rows change
    places within it).  The largest unit that is turned over is read whole."""
    chunk, raw = least, 1
    for unit in plan.units:
        for name in unit:
            info, move = plan.sources[name], plan.moves[name][0]
            out = plan.tensors[move.tensor]
            item = max(dtypes.SIZES[info.dtype], dtypes.SIZES[out.dtype])
            if move.column >= 0:
                chunk = max(chunk, out.shape[2] * item)
                raw = max(raw, sum(plan.sources[n].nbytes for n in unit))
            else:
                chunk = max(chunk, matrix(info.shape)[1] * item * _rows_at_once(plan, name))
    looped = plan.scales or any(move.column >= 0 for moves in plan.moves.values() for move in moves)
    tables = max((_blocks_at_once(plan, name, chunk) for name in plan.scales), default=0) * TABLE_BYTES
    return BufferSizes(max(raw, chunk), chunk, memory_bytes() if looped else 0, tables)


def _blocks_at_once(plan: Plan, name: str, chunk: int) -> int:
    """How many blocks of a quantised matrix a chunk of values touches: whole rows of it, or whole columns."""
    shape, block = plan.sources[name].shape, plan.sizes.block
    along, across = (0, 1) if plan.moves[name][0].column < 0 else (1, 0)
    deep = min(shape[along], chunk // shape[across])
    return (deep // block[along] + 2) * (shape[across] // block[across] + 1)


def _rows_at_once(plan: Plan, name: str) -> int:
    return max((len(o) for m in plan.moves[name] if (o := plan.row_order(m)) is not None), default=1)


@dataclass(frozen=True)
class Work:
    """What one worker has: `advance(bytes read)` after each block, `stopped()` before the next."""

    plan: Plan
    source: Source
    outputs: Outputs
    buffers: Buffers
    advance: Callable[[int], None]
    stopped: Callable[[], bool]


def move_unit(work: Work, unit: tuple[str, ...]) -> list[Moved]:
    """Bring the sources of a unit to all their places."""
    plan, source = work.plan, work.source
    scales = {n: _read_scales(plan, n, source) for n in unit if n in plan.scales}
    turned = plan.moves[unit[0]][0].column >= 0
    move = _turn_over if turned else _move_rows
    digests, targets = move(work, unit, scales)
    parts: dict[tuple[int, int, int], str] = {}
    for target in targets:
        pad_hash(target.hash, target.nbytes - target.written)
        parts[target.key] = "xxh3:" + target.hash.hexdigest()
    moved = []
    for name in unit:
        source.release(plan.sources[name])
        moved.append(Moved(name, digests[name], parts if name == unit[0] else {}))
        if name in scales:
            moved.append(Moved(plan.scales[name], scales[name].digest, {}))
            work.advance(plan.sources[plan.scales[name]].nbytes)
    return moved


@dataclass(frozen=True)
class _Scales:
    """The scales of one source, and the digest of their bytes."""

    values: NDArray[np.float32]
    block: tuple[int, int]
    digest: str

    def blocks(self, dtype: str) -> Blocks:
        return Blocks(self.values, self.block, NUMPY[dtype])


def _read_scales(plan: Plan, name: str, source: Source) -> _Scales:
    info = plan.sources[plan.scales[name]]
    data = bytearray(info.nbytes)
    source.read(info, 0, memoryview(data))
    values = np.frombuffer(data, NUMPY[info.dtype]).astype(np.float32).reshape(info.shape)
    if not np.isfinite(values).all():
        row, column = (int(i[0]) for i in np.nonzero(~np.isfinite(values)))
        raise CheckpointError(
            f"{info.name}: the scale of block [{row}, {column}] is {values[row, column]}.",
            "Download the file that holds it again.",
        )
    return _Scales(values, plan.sizes.block, "xxh3:" + xxhash.xxh3_128_hexdigest(data))


def _move_rows(
    work: Work, unit: tuple[str, ...], scales: dict[str, _Scales]
) -> tuple[dict[str, str], list[_Target]]:
    """A block of rows is read once, cut for every rank, cast, hashed and written."""
    plan, source, outputs, buffers = work.plan, work.source, work.outputs, work.buffers
    (name,) = unit
    info = plan.sources[name]
    rows, cols = matrix(info.shape)
    pitch = cols * dtypes.SIZES[info.dtype]
    targets = [t for move in plan.moves[name] for t in _targets(plan, name, move)]
    out = targets[0].dtype
    widest = cols * max(dtypes.SIZES[info.dtype], dtypes.SIZES[out])
    together = _rows_at_once(plan, name)
    step = max(together, buffers.chunk_bytes // max(1, widest) // together * together)
    blocks = scales[name].blocks(out) if name in scales else None
    digest = xxhash.xxh3_128()
    for row in range(0, rows if pitch else 0, step):
        if work.stopped():
            raise Stopped
        count = min(step, rows - row)
        raw = buffers.raw[: count * pitch]
        source.read(info, row * pitch, raw.data)
        digest.update(raw.data)
        block, dtype = raw, info.dtype
        if blocks is not None:
            block, dtype = _dequantise(name, raw.reshape(count, cols), row, blocks, out, buffers), out
        for target in targets:
            for box in target.boxes:
                top, bottom = max(row, box.row), min(row + count, box.row + box.rows)
                if top < bottom:
                    piece = _cut(block, dtype, cols, top - row, bottom - row, box, target, buffers, name)
                    target.write(piece, outputs)
        work.advance(len(raw))
    return {name: "xxh3:" + digest.hexdigest()}, targets


def _turn_over(
    work: Work, unit: tuple[str, ...], scales: dict[str, _Scales]
) -> tuple[dict[str, str], list[_Target]]:
    """One expert's matrices are read whole and written turned over, side by side: [in, out]."""
    plan, source, outputs, buffers = work.plan, work.source, work.outputs, work.buffers
    sources: list[tuple[NDArray[Any], Blocks | None]] = []
    digests: dict[str, str] = {}
    moves = [plan.moves[name][0] for name in unit]
    tensor = plan.tensors[moves[0].tensor]
    out = NUMPY[tensor.dtype]
    begin = 0
    for name in unit:
        info = plan.sources[name]
        raw = buffers.raw[begin : begin + info.nbytes]
        begin += info.nbytes
        source.read(info, 0, raw.data)
        work.advance(len(raw))
        digests[name] = "xxh3:" + xxhash.xxh3_128_hexdigest(raw.data)
        blocks = scales[name].blocks(tensor.dtype) if name in scales else None
        codes = raw.view(f"u{dtypes.SIZES[info.dtype]}").reshape(info.shape)
        if blocks is not None:
            _check_codes(name, codes)
        sources.append((codes, blocks))
    height, width = tensor.shape[1], tensor.shape[2]
    step = max(1, buffers.chunk_bytes // (width * max(out.itemsize, *(c.itemsize for c, _ in sources))))
    targets = _targets(plan, unit[0], moves[0])
    for target in targets:
        boxes = [plan.boxes(name, move, target.rank)[0] for name, move in zip(unit, moves, strict=True)]
        for first in range(0, height, step):
            if work.stopped():
                raise Stopped
            count = min(step, height - first)
            data = buffers.wide[: count * width * out.itemsize]
            turned = data.view(out).reshape(count, width)
            for name, move, box, (codes, blocks) in zip(unit, moves, boxes, sources, strict=True):
                place = turned[:, move.column : move.column + box.rows]
                left = box.col + first
                piece = codes[box.row : box.row + box.rows, left : left + count]
                dtype = plan.sources[name].dtype
                if blocks is not None:
                    lost = blocks.turned(piece, box.row, left, place.view(f"u{out.itemsize}"))
                    if lost:
                        raise _too_large(name, lost, tensor.dtype)
                elif dtype == tensor.dtype:
                    turn(piece, place.view(f"u{out.itemsize}"))
                else:
                    size = piece.size * piece.itemsize
                    between = buffers.cut[:size].view(piece.dtype).reshape(count, box.rows)
                    turn(piece, between)
                    _cast(between.view(NUMPY[dtype]), place, name)
            target.write(data, outputs)
    return digests, targets


def _targets(plan: Plan, name: str, move: Move) -> list[_Target]:
    tensor = plan.tensors[move.tensor]
    offset = plan.part_offset(move)
    order = plan.row_order(move)
    return [
        _Target(
            rank,
            tensor.file,
            offset,
            tensor.parts[move.part],
            plan.boxes(name, move, rank),
            tensor.dtype,
            (move.tensor, move.part, rank),
            order,
            xxhash.xxh3_128(),
        )
        for rank in plan.ranks(move)
    ]


def _check_codes(name: str, codes: NDArray[np.uint8]) -> None:
    if bad := count_nan(codes):
        raise CheckpointError(
            f"{name}: {bad} of its FP8 codes are no number (0x7f or 0xff).",
            "Download the file that holds it again; a sound checkpoint has none.",
        )


def _dequantise(
    name: str, codes: NDArray[np.uint8], first: int, blocks: Blocks, dtype: str, buffers: Buffers
) -> NDArray[np.uint8]:
    _check_codes(name, codes)
    size = codes.size * dtypes.SIZES[dtype]
    out = buffers.wide[:size].view(f"u{dtypes.SIZES[dtype]}").reshape(codes.shape)
    if lost := blocks.rows(codes, first, out):
        raise _too_large(name, lost, dtype)
    return buffers.wide[:size]


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
        if box.cols == cols and target.order is None:
            return block[top * pitch : bottom * pitch]
        word = next(w for w in (8, 4, 2, 1) if not (pitch % w or box.col * item % w or box.cols * item % w))
        view = block.view(f"u{word}").reshape(-1, pitch // word)
        first, width = box.col * item // word, box.cols * item // word
        size = (bottom - top) * width
        out = buffers.cut[: size * word].view(f"u{word}").reshape(bottom - top, width)
        np.copyto(out, _ordered(view[top:bottom, first : first + width], target.order))
        return buffers.cut[: size * word]
    wide = block.view(NUMPY[dtype]).reshape(-1, cols)[top:bottom, box.col : box.col + box.cols]
    size = wide.size * dtypes.SIZES[target.dtype]
    _cast(_ordered(wide, target.order), buffers.cut[:size].view(NUMPY[target.dtype]).reshape(wide.shape), name)
    return buffers.cut[:size]


def _ordered(rows: NDArray[Any], order: NDArray[np.intp] | None) -> NDArray[Any]:
    """Whole heads with their rows in another order."""
    if order is None:
        return rows
    return rows.reshape(-1, len(order), rows.shape[1])[:, order].reshape(rows.shape)


def _cast(wide: NDArray[Any], out: NDArray[Any], name: str) -> None:
    """Raises CheckpointError if float16 cannot hold a number."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, wide, casting="unsafe")
    if out.dtype == np.float16 and (lost := int(np.isinf(out).sum()) - int(np.isinf(wide).sum())):
        raise _too_large(name, lost, "float16")


def _too_large(name: str, lost: int, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {lost} values are beyond {dtype}'s range (largest {LARGEST[dtype]}).",
        "Convert with --dtype bfloat16 or float32." if dtype == "float16" else "Its scales cannot be right.",
    )


def pad_hash(hasher: xxhash.xxh3_128, zeros: int) -> None:
    """What was not written is zeros (files are preallocated): rows that pad the last ranks."""
    while zeros > 0:
        n = min(zeros, len(_ZEROS))
        hasher.update(_ZEROS[:n])
        zeros -= n
