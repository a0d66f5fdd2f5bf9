"""The inner loops: table lookups, int8 codes, transposing.  numba where it is installed, else numpy: the same
bits.

Both leave the interpreter lock, so threads run side by side.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FP8: NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

CODE = 127  # the largest int8 code
TILE = 64  # square that is transposed at a time: in and out fit the processor's first cache


class Numpy:
    """numpy, block by block."""

    @staticmethod
    def look_up(codes: Array, tables: Array, first: int, rows: int, columns: int, out: Array) -> None:
        for begin, end in _pieces(first, first + len(codes), rows):
            for left, right in _pieces(0, codes.shape[1], columns):
                piece = codes[begin - first : end - first, left:right]
                out[begin - first : end - first, left:right] = tables[begin // rows, left // columns].take(piece)

    @staticmethod
    def look_up_transposed(
        codes: Array, tables: Array, top: int, left: int, rows: int, columns: int, out: Array
    ) -> None:
        for j0, j1 in _pieces(left, left + codes.shape[1], columns):
            for i0, i1 in _pieces(top, top + codes.shape[0], rows):
                piece = codes[i0 - top : i1 - top, j0 - left : j1 - left]
                out[j0 - left : j1 - left, i0 - top : i1 - top] = tables[i0 // rows, j0 // columns].take(piece.T)

    @staticmethod
    def widen(words: Array, out: Array) -> None:
        np.left_shift(words, 16, out=out, dtype=np.uint32)

    @staticmethod
    def largest_magnitudes(values: Array, out: Array) -> None:
        np.abs(values).max(1, out=out[:, 0], initial=0.0)

    @staticmethod
    def encode(values: Array, scales: Array, out: Array) -> None:
        np.clip(np.rint(values / scales), -CODE, CODE, out=out, casting="unsafe")

    @staticmethod
    def largest_codes(codes: Array, columns: int, out: Array) -> None:
        begins = range(0, codes.shape[1], columns)
        np.maximum.reduceat(codes & 0x7F, begins, axis=1, out=out)

    @staticmethod
    def encode_fp8(
        codes: Array, scales: Array, divisors: Array, first: int, rows: int, columns: int, out: Array
    ) -> None:
        values = np.empty(codes.shape, np.float32)
        Numpy.scaled(codes, FP8, scales, first, rows, columns, values)
        Numpy.encode(values, divisors, out)

    @staticmethod
    def scaled(codes: Array, table: Array, scales: Array, first: int, rows: int, columns: int, out: Array) -> None:
        table.take(codes, out=out)
        for begin, end in _pieces(first, first + len(codes), rows):
            for left, right in _pieces(0, codes.shape[1], columns):
                out[begin - first : end - first, left:right] *= scales[begin // rows, left // columns]

    @staticmethod
    def transpose_bytes(words: Array, out: Array) -> None:
        Numpy.transpose(words.view(np.uint8), out.view(np.uint8))

    @staticmethod
    def transpose(matrix: Array, out: Array) -> None:
        for j0, j1 in _pieces(0, out.shape[0], TILE):
            for i0, i1 in _pieces(0, out.shape[1], TILE):
                out[j0:j1, i0:i1] = matrix[i0:i1, j0:j1].T


def _pieces(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """[begin, end) cut where a multiple of `size` lies."""
    while begin < end:
        stop = min(end, (begin // size + 1) * size)
        yield begin, stop
        begin = stop


def look_up(codes: Array, tables: Array, first: int, rows: int, columns: int, out: Array) -> None:
    """out[i, j] = tables[(first + i) // rows, j // columns, codes[i, j]]."""
    _kernels().look_up(codes, tables, first, rows, columns, out)


def look_up_transposed(
    codes: Array, tables: Array, top: int, left: int, rows: int, columns: int, out: Array
) -> None:
    """out[j, i] = tables[(top + i) // rows, (left + j) // columns, codes[i, j]]."""
    _kernels().look_up_transposed(codes, tables, top, left, rows, columns, out)


def widen(words: Array, out: Array) -> None:
    """bfloat16 as 16-bit words [N] -> the same values as the words of float32 [N]."""
    _kernels().widen(words, out)


def largest_magnitudes(values: Array, out: Array) -> None:
    """out[i, 0] = the largest |values[i, j]|; not finite if one of them is not."""
    _kernels().largest_magnitudes(values, out)


def encode(values: Array, scales: Array, out: Array) -> None:
    """out[i, j] = values[i, j] / scales[i, 0], rounded half to even, from -127 to 127."""
    _kernels().encode(values, scales, out)


def largest_codes(codes: Array, columns: int, out: Array) -> None:
    """out[i, b] = the largest of codes[i, j], without their signs, where j // columns = b."""
    _kernels().largest_codes(codes, columns, out)


def encode_fp8(
    codes: Array, scales: Array, divisors: Array, first: int, rows: int, columns: int, out: Array
) -> None:
    """`encode` of FP8 codes without NaN: out[i, j] = FP8[codes[i, j]] * scales[(first + i) // rows, j // columns]
    in float32, / divisors[i, 0], rounded half to even, from -127 to 127.  `out` is other memory than `codes`."""
    _kernels().encode_fp8(codes, scales, divisors, first, rows, columns, out)


def scaled(codes: Array, table: Array, scales: Array, first: int, rows: int, columns: int, out: Array) -> None:
    """out[i, j] = table[codes[i, j]] * scales[(first + i) // rows, j // columns], float32."""
    _kernels().scaled(codes, table, scales, first, rows, columns, out)


def transpose(matrix: Array, out: Array) -> None:
    """out[j, i] = matrix[i, j]."""
    if 1 in matrix.shape:
        np.copyto(out, matrix.T)
    elif _is_of_words(matrix) and _is_of_words(out):
        _kernels().transpose_bytes(matrix.view(np.uint64), out.view(np.uint64))
    else:
        _kernels().transpose(matrix, out)


def _is_of_words(matrix: Array) -> bool:
    """Whether its rows are bytes that can be taken as words of eight."""
    if matrix.itemsize != 1 or 0 in matrix.shape:
        return False
    places = (*matrix.shape, matrix.ctypes.data, matrix.strides[0])
    return matrix.strides[1] == 1 and all(place % 8 == 0 for place in places)


def memory_bytes() -> int:
    """What the loops take besides their data: numba's compiler, measured."""
    return 160 << 20 if _kernels() is not Numpy else 0


_chosen: Any = None


def _kernels() -> Any:
    """Numba's, unless it is missing or MSCONV_NUMBA=0."""
    global _chosen
    if _chosen is None:
        wanted = os.environ.get("MSCONV_NUMBA", "1") != "0"
        if wanted and importlib.util.find_spec("numba") is not None:
            from . import compiled

            _chosen = compiled
        else:
            _chosen = Numpy
    return _chosen
