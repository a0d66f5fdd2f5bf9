"""FP8 codes and the scales of their blocks: what no scale alone shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.dtypes import DTYPES

from ..layout.cuts import matrix
from ..layout.model import TensorInfo
from ..quant.kernels import FP8
from ..quant.scales import USED, ZeroScales
from ..stream.cutting import beyond
from .findings import Findings

Array = NDArray[Any]
ELEMENT = "float8_e4m3fn"
ENDING = "_scale_inv"
LARGEST = np.float32(448)


def fits_blocks(info: TensorInfo, tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None) -> bool:
    """Whether this matrix of codes has one scale for each of its blocks; `block`: their rows and columns."""
    scales = tensors.get(info.name + ENDING)
    if block is None or scales is None or len(info.shape) != 2 or not all(info.shape):
        return False
    return scales.shape == tuple(-(-size // side) for size, side in zip(info.shape, block, strict=True))


class Blocks:
    """Scales that are held against their codes as those pass: of 0, and so large that values may be beyond the
    range of `dtype`, as which the matrix is converted."""

    def __init__(self, info: TensorInfo, scales: Array, block: tuple[int, int], dtype: str) -> None:
        self.name, self.block, self.dtype = info.name, block, dtype
        self.width, self.row = matrix(info.shape)[1], 0
        self.scales = scales.astype(np.float32).reshape(-1, -(-self.width // block[1]))
        self.zeros = ZeroScales(self.scales, block, ELEMENT)
        with np.errstate(over="ignore", invalid="ignore"):
            reach = self._rounded(np.abs(self.scales) * LARGEST)
        self.large: NDArray[np.bool_] = np.isfinite(self.scales) & np.isinf(reach)
        self.used: dict[tuple[int, int], None] = {}
        self.lost = 0

    @property
    def is_needed(self) -> bool:
        """Whether codes need be looked at."""
        return bool(self.zeros.zero.any() or self.large.any())

    def see(self, codes: NDArray[np.uint8]) -> None:
        """The next rows."""
        codes = codes.reshape(-1, self.width)
        rows, columns = self.block
        self.used |= dict.fromkeys(self.zeros.used(codes, self.row))
        bands = (self.row + np.arange(len(codes))) // rows
        for row, block in np.argwhere(self.large[bands]).tolist():
            piece = codes[row, block * columns : (block + 1) * columns]
            with np.errstate(over="ignore"):
                self.lost += int(np.isinf(self._rounded(FP8[piece] * self.scales[bands[row], block])).sum())
        self.row += len(codes)

    def end(self, findings: Findings) -> None:
        scales = self.name + ENDING
        if self.used:
            band, block = next(iter(self.used))
            first = f"{len(self.used)} of {self.scales.size} in {scales}, that of block [{band}, {block}]"
            findings.add("error", "scales", f"{USED.fault}, and their codes are not", [scales], first)
        if self.lost:
            findings.add("error", "scales", beyond(self.dtype), [self.name], f"{self.lost} of {self.name}")

    def _rounded(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values.astype(DTYPES[self.dtype].numpy).astype(np.float32)
