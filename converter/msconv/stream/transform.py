"""Moving source tensors: read once, decode, cut for every rank, transpose, cast, hash, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from msconv_runtime.dtypes import DTYPES

from ..layout.cuts import Box, matrix
from ..layout.model import TensorInfo
from ..layout.plan import Move, Plan
from ..quant.kernels import transpose, widen
from ..quant.record import Decoder, MadeFormat
from ..quant.scales import refuse_numbers
from ..quant.w8a8 import INPUT_OFFSET
from ..quant.w8a8 import shares as shares_of
from .buffers import ENCODED_BYTES, Buffers, rows_together
from .companions import VALUES, Beside, beside, check_numbers
from .cutting import cast, cut_rows, too_large
from .left_out import is_lost, refuse_lost
from .outputs import Outputs
from .rank_parts import RankPart, rank_parts
from .source import Source


class Stopped(Exception):
    """Another thread asked to stop."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A source tensor that is in all its places.  `parts[(tensor, part, rank)]` = digest; those of a unit of
    several are with its first."""

    name: str
    source_digest: str
    parts: dict[tuple[int, int, int], str]


@dataclass(frozen=True)
class Work:
    """What one worker has: `advance(bytes read)` after each block, `stopped()` before the next."""

    plan: Plan
    source: Source
    outputs: Outputs
    buffers: Buffers
    advance: Callable[[int], None]
    stopped: Callable[[], bool]

    def go_on(self) -> None:
        """Raises Stopped if another thread asked to stop."""
        if self.stopped():
            raise Stopped


def move_unit(work: Work, unit: tuple[str, ...]) -> list[Moved]:
    """Bring the sources of a unit to all their places."""
    plan, source = work.plan, work.source
    digests: dict[str, str] = {}
    for name in unit:
        _check_left_out(work, name, digests)
    found = {n: _beside(work, n, digests) for n in unit}
    is_transposed = plan.moves[unit[0]][0].is_transposed
    places = (_transpose if is_transposed else _move_rows)(work, unit, found, digests)
    parts = {place.key: place.digest() for place in places}
    moved = []
    for name in unit:
        source.release(plan.sources[name])
        moved.append(Moved(name, digests[name], parts if name == unit[0] else {}))
        for companion in plan.read_with(name):
            moved.append(Moved(companion, digests[companion], {}))
            work.advance(plan.sources[companion].nbytes)
    return moved


def _check_left_out(work: Work, name: str, digests: dict[str, str]) -> None:
    """Look at what is left out with this source.  Raises CheckpointError if something would be lost."""
    for entry in work.plan.checked.get(name, ()):
        hasher = xxhash.xxh3_128()
        if is_lost(work.plan, work.source, entry, hasher.update):
            refuse_lost([entry])
        digests[entry.name] = "xxh3:" + hasher.hexdigest()


def _beside(work: Work, name: str, digests: dict[str, str]) -> Beside:
    """What stands beside this source's codes, read whole."""
    return beside(
        work.plan,
        name,
        lambda info: _read_whole(work, info, digests),
        lambda info: _read_whole(work, info, {}),
    )


def _move_rows(
    work: Work, unit: tuple[str, ...], found: Mapping[str, Beside], digests: dict[str, str]
) -> list[RankPart]:
    """A block of rows is read once, cut for every rank, cast, hashed and written."""
    plan, buffers = work.plan, work.buffers
    name = unit[0]
    info = plan.sources[name]
    rows, cols = matrix(info.shape)
    pitch = cols * DTYPES[info.dtype].nbytes
    places = [(move.item, place) for move in plan.moves[name] for place in rank_parts(plan, name, move)]
    encoded = plan.encoded.get(name)
    sums = ColumnSums(plan, name, unit[1]) if len(unit) > 1 else None
    out = VALUES if encoded else places[0][1].dtype
    widest = cols * max(DTYPES[info.dtype].nbytes, DTYPES[out].nbytes)
    together = rows_together(plan, name)
    step = max(together, buffers.chunk_bytes // max(1, widest) // together * together)
    hasher = xxhash.xxh3_128()
    decoder = found[name].decoder
    for row in range(0, rows if pitch else 0, step):
        work.go_on()
        count = min(step, rows - row)
        raw = buffers.raw[: count * pitch]
        work.source.read(info, row * pitch, raw.data)
        hasher.update(raw.data)
        check_numbers(plan, name, raw, row)
        found[name].check(raw.reshape(count, pitch), row)
        if encoded:
            behind = len(raw) if decoder is not None else 0
            codes = buffers.raw[behind : behind + count * cols].view(np.int8).reshape(count, cols)
            made = encode(Block(name, raw, info.dtype, row, (count, cols), decoder), encoded, codes, buffers)
        elif decoder is not None:
            made = [(_decode(name, raw.reshape(count, cols), row, decoder, out, buffers), out, cols)]
        else:
            made = [(raw, info.dtype, cols)]
        if sums is not None:
            sums.add(raw.view(np.int8).reshape(count, cols), row)
        for item, place in places:
            for box in place.boxes:
                piece = cut_rows(*made[item], row, box, place, buffers, name)
                if piece is not None:
                    place.write(piece, work.outputs)
        work.advance(len(raw))
    digests[name] = "xxh3:" + hasher.hexdigest()
    written = [place for _, place in places]
    return written if sums is None else written + sums.write(work, digests)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a source: `data` [R, C] of the type `dtype`, `first` the number of the first."""

    name: str
    data: NDArray[np.uint8]
    dtype: str
    first: int
    shape: tuple[int, int]
    decoder: Decoder | None


def encode(
    block: Block, encoded: MadeFormat, codes: NDArray[np.int8], buffers: Buffers
) -> list[tuple[NDArray[np.uint8], str, int]]:
    """Rows of values -> what they are stored as: (bytes, element type, columns) of each tensor.  `codes` [R, C]
    may lie where the values did, but not where codes that are decoded did."""
    count, cols = block.shape
    others = None
    if block.decoder is not None:
        source = block.data.reshape(count, cols)
        others = encoded.encode_decoded(block.name, block.decoder, source, block.first, codes)
    if others is None:
        others = encoded.encode(block.name, _values(block, buffers), codes)
    of_codes, of_others = encoded.stored
    return [
        (codes.reshape(-1).view(np.uint8), of_codes.dtype, cols),
        (others.reshape(-1).view(np.uint8), of_others.dtype, 1),
    ]


def _values(block: Block, buffers: Buffers) -> NDArray[np.float32]:
    """The rows in float32."""
    count, cols = block.shape
    words = buffers.decoded[: count * cols * 4]
    if block.decoder is not None:
        _decode(block.name, block.data.reshape(count, cols), block.first, block.decoder, VALUES, buffers)
    elif block.dtype == "bfloat16":
        widen(block.data.view(np.uint16), words.view(np.uint32))
    else:
        np.copyto(words.view(np.float32), block.data.view(DTYPES[block.dtype].numpy), casting="unsafe")
    return words.view(np.float32).reshape(count, cols)


class ColumnSums:
    """Sums over each rank's columns of a matrix of codes, row by row, and the shares of what they are part of."""

    def __init__(self, plan: Plan, matrix_name: str, name: str) -> None:
        self.plan, self.matrix, self.name = plan, matrix_name, name
        (move,) = plan.moves[matrix_name]
        self.boxes = [plan.boxes(matrix_name, move, rank)[0] for rank in plan.mesh.ranks]
        self.sums = np.zeros((plan.mesh.tp, plan.sources[matrix_name].shape[0]), np.int64)

    def add(self, codes: NDArray[np.int8], first: int) -> None:
        for rank, box in enumerate(self.boxes):
            part = codes[:, box.col : box.col + box.cols]
            self.sums[rank, first : first + len(codes)] = part.sum(1, dtype=np.int64)

    def write(self, work: Work, digests: dict[str, str]) -> list[RankPart]:
        plan, info = self.plan, self.plan.sources[self.name]
        total = _read_whole(work, info, digests)
        offset_name = INPUT_OFFSET.of(self.matrix)
        offset = _read_whole(work, plan.sources[offset_name], {})
        refuse_numbers(offset_name, INPUT_OFFSET, offset.astype(np.float32))
        shares = shares_of(total, self.sums, float(offset[0]))
        (move,) = plan.moves[self.name]
        places = rank_parts(plan, self.name, move)
        for place, share in zip(places, shares, strict=True):
            place.write(np.ascontiguousarray(share).view(np.uint8), work.outputs)
        work.advance(info.nbytes)
        return places


def _read_whole(work: Work, info: TensorInfo, digests: dict[str, str]) -> NDArray[Any]:
    """A small source; its digest is noted."""
    data = bytearray(info.nbytes)
    work.source.read(info, 0, memoryview(data))
    digests[info.name] = "xxh3:" + xxhash.xxh3_128_hexdigest(data)
    return np.frombuffer(data, DTYPES[info.dtype].numpy).reshape(info.shape)


def _decode(
    name: str, codes: NDArray[np.uint8], first: int, decoder: Decoder, dtype: str, buffers: Buffers
) -> NDArray[np.uint8]:
    decoder.check(codes)
    size = codes.size * DTYPES[dtype].nbytes
    out = buffers.decoded[:size].view(DTYPES[dtype].bits).reshape(codes.shape)
    if lost := decoder.rows(codes, first, out):
        raise too_large(name, lost, dtype)
    return buffers.decoded[:size]


@dataclass(frozen=True, slots=True)
class _Whole:
    """A matrix of an expert, read whole, [out, in]: values or codes as words of their width."""

    name: str
    dtype: str
    words: NDArray[Any]
    decoder: Decoder | None
    move: Move

    def transpose(self, box: Box, first: int, count: int, out: NDArray[Any], dtype: str, buffers: Buffers) -> None:
        """Columns [first, first + count) of the rows in `box` -> `out` [count, rows], of the type `dtype`."""
        left = box.col + first
        piece = self.words[box.row : box.row + box.rows, left : left + count]
        if self.decoder is not None:
            if lost := self.decoder.transposed(piece, box.row, left, out.view(DTYPES[dtype].bits)):
                raise too_large(self.name, lost, dtype)
        elif self.dtype == dtype:
            transpose(piece, out.view(DTYPES[dtype].bits))
        else:
            size = piece.size * piece.itemsize
            between = buffers.cut[:size].view(piece.dtype).reshape(count, box.rows)
            transpose(piece, between)
            cast(between.view(DTYPES[self.dtype].numpy), out, self.name)


def _transpose(
    work: Work, unit: tuple[str, ...], found: Mapping[str, Beside], digests: dict[str, str]
) -> list[RankPart]:
    """One expert's matrices are read, or encoded, whole and written transposed, side by side: [in, out]."""
    plan, buffers = work.plan, work.buffers
    sources: list[_Whole] = []
    others: list[_Whole] = []
    begin = 0
    for name in unit:
        info, around = plan.sources[name], found[name]
        raw = buffers.raw[begin : begin + info.nbytes]
        begin += info.nbytes
        if name in plan.encoded:
            whole, rest = _encoded(work, info, raw, around, digests)
            others.append(rest)
        else:
            work.source.read(info, 0, raw.data)
            work.advance(len(raw))
            digests[name] = "xxh3:" + xxhash.xxh3_128_hexdigest(raw.data)
            words = raw.view(DTYPES[info.dtype].bits).reshape(matrix(info.shape))
            check_numbers(plan, name, raw, 0)
            around.check(words, 0)
            if around.decoder is not None:
                around.decoder.check(words)
            whole = _Whole(name, info.dtype, words, around.decoder, plan.moves[name][0])
        sources.append(whole)
    places = _write_transposed(work, sources)
    return places + (_write_transposed(work, others) if others else [])


def _encoded(
    work: Work, info: TensorInfo, room: NDArray[np.uint8], found: Beside, digests: dict[str, str]
) -> tuple[_Whole, _Whole]:
    """A matrix as codes, which begin where `room` does, and what each row has besides, [out, 1].  Rows are encoded
    while they are in the processor's cache."""
    plan, buffers, name = work.plan, work.buffers, info.name
    encoded = plan.encoded[name]
    rows, cols = matrix(info.shape)
    pitch = cols * DTYPES[info.dtype].nbytes
    codes = room[: rows * cols].view(np.int8).reshape(rows, cols)
    of_others = encoded.stored[1]
    rest = np.empty((rows, 1), DTYPES[of_others.dtype].bits)
    step = max(1, buffers.chunk_bytes // (cols * ENCODED_BYTES))
    hasher = xxhash.xxh3_128()
    for first in range(0, rows, step):
        work.go_on()
        count = min(step, rows - first)
        data = buffers.cut[: count * pitch]
        work.source.read(info, first * pitch, data.data)
        hasher.update(data.data)
        found.check(data.reshape(count, pitch), first)
        block = Block(name, data, info.dtype, first, (count, cols), found.decoder)
        made = encode(block, encoded, codes[first : first + count], buffers)
        rest[first : first + count] = made[1][0].view(rest.dtype).reshape(-1, 1)
        work.advance(len(data))
    digests[name] = "xxh3:" + hasher.hexdigest()
    move, of_rest = plan.moves[name]
    return (
        _Whole(name, encoded.stored[0].dtype, codes.view(np.uint8), None, move),
        _Whole(name, of_others.dtype, rest, None, of_rest),
    )


def _write_transposed(work: Work, sources: list[_Whole]) -> list[RankPart]:
    """Matrices transposed, side by side."""
    plan, buffers = work.plan, work.buffers
    move = sources[0].move
    dtype = plan.tensors[move.tensor].dtype
    out = DTYPES[dtype].numpy
    height, width = plan.part_matrix(move)
    step = max(1, buffers.chunk_bytes // (width * max(out.itemsize, *(s.words.itemsize for s in sources))))
    places = rank_parts(plan, sources[0].name, move)
    for place in places:
        boxes = [plan.boxes(s.name, s.move, place.rank)[0] for s in sources]
        for first in range(0, height, step):
            work.go_on()
            count = min(step, height - first)
            data = buffers.decoded[: count * width * out.itemsize]
            block = data.view(out).reshape(count, width)
            for source, box in zip(sources, boxes, strict=True):
                columns = block[:, source.move.column : source.move.column + box.rows]
                source.transpose(box, first, count, columns, dtype, buffers)
            place.write(data, work.outputs)
    return places
