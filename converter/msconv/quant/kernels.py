"""The inner loops: table lookups and transposing.  numba where it is installed, else numpy: the same bits.

Both leave the interpreter lock, so threads run side by side.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

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


def transpose(matrix: Array, out: Array) -> None:
    """out[j, i] = matrix[i, j]."""
    _kernels().transpose(matrix, out)


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
