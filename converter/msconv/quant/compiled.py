"""The inner loops of `kernels`, compiled by numba.  Its types are not known to type checkers."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

TILE = 16  # rows that are read side by side: more of them, and their cache lines push each other out

compile_loop: Any = numba.njit(nogil=True, error_model="numpy")  # else each division asks first


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
def scaled(codes: Any, table: Any, scales: Any, first: int, rows: int, columns: int, out: Any) -> None:
    count, width = codes.shape
    for i in range(count):
        of_row = scales[(first + i) // rows]
        for j0 in range(0, width, columns):
            scale = of_row[j0 // columns]
            piece, place = codes[i, j0 : j0 + columns], out[i, j0 : j0 + columns]
            for j in range(piece.size):
                place[j] = table[piece[j]] * scale


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
def largest_codes(codes: Any, columns: int, out: Any) -> None:
    rows, width = codes.shape
    for i in range(rows):
        for j0 in range(0, width, columns):
            piece = codes[i, j0 : j0 + columns]
            largest = np.uint8(0)
            for j in range(piece.size):
                largest = max(largest, np.uint8(piece[j] & np.uint8(0x7F)))
            out[i, j0 // columns] = largest


@compile_loop
def encode_fp8(codes: Any, scales: Any, divisors: Any, first: int, rows: int, columns: int, out: Any) -> None:
    """The value is made of its bits: exponent and mantissa are where float32 has them, 20 bits to the left, with 7
    for a bias of 127.  Those of the smallest exponent are multiples of 2^-9."""
    count, width = codes.shape
    for i in range(count):
        of_row, divisor = scales[(first + i) // rows], divisors[i, 0]
        for j0 in range(0, width, columns):
            scale = of_row[j0 // columns]
            piece, place = codes[i, j0 : j0 + columns], out[i, j0 : j0 + columns]
            for j in range(piece.size):
                code = np.uint32(piece[j])
                size = code & np.uint32(0x7F)
                value = np.uint32((size + np.uint32((127 - 7) << 3)) << np.uint32(20)).view(np.float32)
                if size < np.uint32(8):
                    value = np.float32(np.int32(size)) * np.float32(2.0**-9)
                found = np.rint(value * scale / divisor)
                made = np.int8(min(max(found, np.float32(-127)), np.float32(127)))
                place[j] = -made if code >= np.uint32(0x80) else made


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


@compile_loop
def transpose_bytes(words: Any, out: Any) -> None:
    """Of bytes, eight in a word: [8 N, M] words -> [8 M, N] words.  In squares of eight by eight, halves change
    places, then quarters, then single bytes (Hacker's Delight, 7-3)."""
    height, width = words.shape
    a, b, c = np.uint64(0x00000000FFFFFFFF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF)
    far, mid, near = np.uint64(32), np.uint64(16), np.uint64(8)
    for i0 in range(0, height, 64):
        for j0 in range(0, width, 8):
            for j in range(j0, min(width, j0 + 8)):
                for i in range(i0, min(height, i0 + 64), 8):
                    x0, x1, x2, x3 = words[i, j], words[i + 1, j], words[i + 2, j], words[i + 3, j]
                    x4, x5, x6, x7 = words[i + 4, j], words[i + 5, j], words[i + 6, j], words[i + 7, j]
                    x0, x4 = (x0 & a) | ((x4 & a) << far), ((x0 >> far) & a) | (x4 & ~a)
                    x1, x5 = (x1 & a) | ((x5 & a) << far), ((x1 >> far) & a) | (x5 & ~a)
                    x2, x6 = (x2 & a) | ((x6 & a) << far), ((x2 >> far) & a) | (x6 & ~a)
                    x3, x7 = (x3 & a) | ((x7 & a) << far), ((x3 >> far) & a) | (x7 & ~a)
                    x0, x2 = (x0 & b) | ((x2 & b) << mid), ((x0 >> mid) & b) | (x2 & ~b)
                    x1, x3 = (x1 & b) | ((x3 & b) << mid), ((x1 >> mid) & b) | (x3 & ~b)
                    x4, x6 = (x4 & b) | ((x6 & b) << mid), ((x4 >> mid) & b) | (x6 & ~b)
                    x5, x7 = (x5 & b) | ((x7 & b) << mid), ((x5 >> mid) & b) | (x7 & ~b)
                    x0, x1 = (x0 & c) | ((x1 & c) << near), ((x0 >> near) & c) | (x1 & ~c)
                    x2, x3 = (x2 & c) | ((x3 & c) << near), ((x2 >> near) & c) | (x3 & ~c)
                    x4, x5 = (x4 & c) | ((x5 & c) << near), ((x4 >> near) & c) | (x5 & ~c)
                    x6, x7 = (x6 & c) | ((x7 & c) << near), ((x6 >> near) & c) | (x7 & ~c)
                    row, column = j * 8, i // 8
                    out[row, column], out[row + 1, column] = x0, x1
                    out[row + 2, column], out[row + 3, column] = x2, x3
                    out[row + 4, column], out[row + 5, column] = x4, x5
                    out[row + 6, column], out[row + 7, column] = x6, x7
