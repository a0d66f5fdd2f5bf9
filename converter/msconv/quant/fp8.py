"""FP8 e4m3 with one scale a block: value = float32(code) * scale, then rounded once to the output's type.

The rule is that of the published DeepSeek-V3 (inference/kernel.py, weight_dequant).  A block has 256 possible
values, so each block gets a table of them, already rounded: one lookup an element, and the same bits whether
numba or numpy does the lookups.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import kernels

Array = NDArray[Any]

CODES: NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Blocks:
    """A matrix's scales, [ceil(rows/b0), ceil(cols/b1)] float32.  Tables are made for the blocks that are asked
    for, so that small blocks cost no more memory than their values."""

    def __init__(self, scales: NDArray[np.float32], block: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self.scales, self.block, self.dtype = scales.astype(np.float32), block, dtype

    def rows(self, codes: NDArray[np.uint8], first: int, out: Array) -> int:
        """Rows of the matrix from `first` on: codes [R, C] -> bit patterns [R, C].  Returns how many of them are
        numbers that the output's type cannot hold."""
        tables, top, _ = self._tables(first, 0, codes.shape)
        kernels.look_up(codes, tables, top, *self.block, out)
        return self._lost(codes, tables, top, 0)

    def turned(self, codes: NDArray[np.uint8], top: int, left: int, out: Array) -> int:
        """A rectangle that begins at (top, left), turned over: codes [R, C] -> bit patterns [C, R].  As `rows`."""
        tables, top, left = self._tables(top, left, codes.shape)
        kernels.look_up_turned(codes, tables, top, left, *self.block, out)
        return self._lost(codes, tables, top, left)

    def _tables(self, top: int, left: int, shape: tuple[int, ...]) -> tuple[Array, int, int]:
        """[block rows, block columns, 256] bit patterns of the blocks that a rectangle touches, and where in them
        it begins."""
        rows, columns = self.block
        i, j = top // rows, left // columns
        scales = self.scales[i : -(-(top + shape[0]) // rows), j : -(-(left + shape[1]) // columns)]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            values = (CODES * scales[:, :, None]).astype(self.dtype)
        return values.view(f"u{self.dtype.itemsize}"), top - i * rows, left - j * columns

    def _lost(self, codes: NDArray[np.uint8], tables: Array, top: int, left: int) -> int:
        infinite = np.isinf(tables.view(self.dtype))  # no code is infinite itself
        if not infinite.any():
            return 0
        rows = (np.arange(top, top + len(codes)) // self.block[0])[:, None]
        columns = (np.arange(left, left + codes.shape[1]) // self.block[1])[None, :]
        return int(infinite[rows, columns, codes].sum())


def count_nan(codes: NDArray[np.uint8]) -> int:
    """Codes that are no number (0x7f and 0xff)."""
    return int(np.count_nonzero((codes & 0x7F) == 0x7F))


def dequantise(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], block: tuple[int, int], dtype: np.dtype[Any]
) -> Array:
    """A whole matrix: codes [R, C] and scales -> values [R, C] of `dtype`."""
    out = np.empty(codes.shape, f"u{dtype.itemsize}")
    Blocks(scales, block, dtype).rows(codes, 0, out)
    return out.view(dtype)
