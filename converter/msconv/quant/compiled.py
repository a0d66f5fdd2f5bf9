"""The inner loops of `kernels`, compiled by numba.  Its types are not known to type checkers."""

from __future__ import annotations

from typing import Any

import numba

TILE = 16  # rows that are read side by side: more of them, and their cache lines push each other out

compile_loop: Any = numba.njit(nogil=True)


@compile_loop
def look_up(codes: Any, tables: Any, first: int, rows: int, columns: int, out: Any) -> None:
    count, width = codes.shape
    for i in range(count):
        block = (first + i) // rows
        for j0 in range(0, width, columns):
            table = tables[block, j0 // columns]
            for j in range(j0, min(width, j0 + columns)):
                out[i, j] = table[codes[i, j]]


@compile_loop
def look_up_transposed(codes: Any, tables: Any, top: int, left: int, rows: int, columns: int, out: Any) -> None:
    height, width = codes.shape
    j0 = 0
    while j0 < width:
        block = (left + j0) // columns
        j1 = min(width, j0 + TILE, (block + 1) * columns - left)
        i0 = 0
        while i0 < height:
            band = (top + i0) // rows
            i1 = min(height, i0 + TILE, (band + 1) * rows - top)
            table = tables[band, block]
            piece = codes[i0:i1, j0:j1]
            place = out[j0:j1, i0:i1]
            for j in range(piece.shape[1]):
                for i in range(piece.shape[0]):
                    place[j, i] = table[piece[i, j]]
            i0 = i1
        j0 = j1


@compile_loop
def transpose(matrix: Any, out: Any) -> None:
    height, width = out.shape
    for j0 in range(0, height, TILE):
        for i0 in range(0, width, TILE):
            place = out[j0 : min(height, j0 + TILE), i0 : min(width, i0 + TILE)]
            piece = matrix[i0 : i0 + place.shape[1], j0 : j0 + place.shape[0]]
            for j in range(place.shape[0]):
                for i in range(place.shape[1]):
                    place[j, i] = piece[i, j]
