"""The inner loops of `kernels`, compiled by numba.  Its types are not known to type checkers."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

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
def widen(words: Any, out: Any) -> None:
    for i in range(words.size):
        out[i] = np.uint32(words[i]) << np.uint32(16)


@compile_loop
def largest_magnitudes(values: Any, out: Any) -> None:
    """By their bits without the sign: those of numbers are in order, and what is not finite comes last."""
    rows, columns = values.shape
    bits, found = values.view(np.uint32), out.view(np.uint32)
    for i in range(rows):
        largest = np.uint32(0)
        row = bits[i]
        for j in range(columns):
            largest = max(largest, row[j] & np.uint32(0x7FFFFFFF))
        found[i, 0] = largest


@compile_loop
def encode(values: Any, scales: Any, out: Any) -> None:
    rows, columns = values.shape
    for i in range(rows):
        scale = scales[i, 0]
        row, codes = values[i], out[i]
        for j in range(columns):
            code = np.rint(row[j] / scale)
            codes[j] = np.int8(min(max(code, np.float32(-127)), np.float32(127)))


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
