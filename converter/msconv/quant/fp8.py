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
NAN = np.isnan(CODES)


class Blocks:
    """The values of a matrix's blocks, made once a matrix.  `scales` [ceil(rows/b0), ceil(cols/b1)] float32."""

    def __init__(self, scales: NDArray[np.float32], block: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self.block = block
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            wide = CODES * scales[:, :, None].astype(np.float32)
            narrow = wide.astype(dtype)
        self.overflow: NDArray[np.bool_] | None = None
        if dtype == np.float16:
            lost = np.isinf(narrow) & np.isfinite(wide)
            self.overflow = lost if lost.any() else None
        self.tables: Array = narrow.view(f"u{dtype.itemsize}")  # [block rows, block columns, 256] bit patterns

    def rows(self, codes: NDArray[np.uint8], first: int, out: Array) -> None:
        """Rows of the matrix from `first` on: codes [R, C] -> bit patterns [R, C]."""
        kernels.look_up(codes, self.tables, first, *self.block, out)

    def turned(self, codes: NDArray[np.uint8], top: int, left: int, out: Array) -> None:
        """A rectangle of the whole matrix's codes, turned over: out [columns, rows] of bit patterns."""
        kernels.look_up_turned(codes, self.tables, top, left, *self.block, out)

    def lost(self, codes: NDArray[np.uint8], first: int) -> int:
        """How many of these rows' values the output type cannot hold."""
        if self.overflow is None:
            return 0
        rows = (np.arange(first, first + len(codes)) // self.block[0])[:, None]
        columns = (np.arange(codes.shape[1]) // self.block[1])[None, :]
        return int(self.overflow[rows, columns, codes].sum())


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
