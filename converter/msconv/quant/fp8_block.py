"""FP8 e4m3 with one scale a block: value = float32(code) * scale, then rounded once to the output's type.

The rule is that of the published DeepSeek-V3 (inference/kernel.py, weight_dequant).  A block has 256 possible
values, so each block gets a table of them, already rounded: one lookup an element, and the same bits whether
numba or numpy does the lookups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.errors import CheckpointError

from . import kernels
from .record import MATRIX, Array, Decoder, Stored, WeightFormat, problem
from .scales import refuse_blocks

CODES = kernels.FP8
NAN = 0x7F  # without its sign
LARGEST = np.float32(448)
SERVER = "how a server rounds activations when it multiplies in FP8; weights are dequantised here"
WHICH = "the element types in the files say which tensors are quantised"
CHECKED_BYTES = 256 << 10  # of codes at a time
TABLE_BYTES = 256 * 12  # of a block, while it is made: float32 products and the output's type


@dataclass(frozen=True, slots=True)
class Fp8Block(WeightFormat):
    """`rows` and `columns` of the blocks; 0 where no configuration says them."""

    rows: int = 0
    columns: int = 0

    name = "fp8-block"
    title = "FP8"
    method = "fp8"
    element = "float8_e4m3fn"
    keys = frozenset({"quant_method", "fmt", "weight_block_size", "activation_scheme"})
    harmless: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("scale_fmt", "dequantize"), SERVER),
        **dict.fromkeys(("modules_to_not_convert", "ignored_layers", "modules_to_convert"), WHICH),
    }

    @classmethod
    def read(cls, config: Mapping[str, object], problems: list[str]) -> Self | None:
        is_described = "fmt" in config or "weight_block_size" in config
        if config.get("quant_method", cls.method if is_described else None) != cls.method:
            return None
        if config.get("fmt", "e4m3") != "e4m3":
            problems.append(problem("fmt", config["fmt"], "only e4m3 is supported"))
        if config.get("activation_scheme", "dynamic") != "dynamic":
            problems.append(problem("activation_scheme", config["activation_scheme"], "only dynamic is supported"))
        block = config.get("weight_block_size")
        sizes = [n for n in block if type(n) is int and 1 <= n <= 1 << 20] if isinstance(block, list) else []
        if not isinstance(block, list) or len(block) != 2 or len(sizes) != 2:
            tensor = ", and FP8 with one scale a tensor is not supported" if block is None else ""
            text = "two sizes are needed, such as [128, 128]" + tensor
            problems.append(problem("weight_block_size", block, text))
            sizes = [1, 1]
        return cls(*sizes)

    @property
    def sources(self) -> tuple[Stored, ...]:
        return (
            Stored(MATRIX.name, MATRIX.shape, self.element),
            Stored("{matrix}_scale_inv", self.scale_shape, "float32", "whole", holds="scales"),
        )

    @property
    def scale_block(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def needs(self) -> str:
        return f"blocks of {self.rows}x{self.columns}"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return -(-rows // self.rows), -(-columns // self.columns)

    def decoder(self, matrix: str, companions: Sequence[Array], dtype: np.dtype[Any]) -> Decoder:
        (scales,) = companions
        values = scales.astype(np.float32)
        refuse_blocks(self.companions(matrix)[0], values)
        return Blocks(values, (self.rows, self.columns), dtype, matrix)

    def decoder_bytes(self, shape: tuple[int, ...], chunk: int, is_transposed: bool) -> int:
        """Tables of the blocks that a chunk of values touches: whole rows of it, or whole columns."""
        block = (self.rows, self.columns)
        along, across = (1, 0) if is_transposed else (0, 1)
        deep = min(shape[along], chunk // shape[across])
        return (deep // block[along] + 2) * (shape[across] // block[across] + 1) * TABLE_BYTES

    def reference(self, matrix: str, read: Callable[[str], Any], rounds: Callable[[Any], Any]) -> Any:
        values = read(matrix)
        scale = read(self.companions(matrix)[0]).repeat_interleave(self.rows, 0)[: len(values)]
        values *= scale.repeat_interleave(self.columns, 1)[:, : values.shape[1]]
        return rounds(values)


class Blocks:
    """A matrix's scales, [ceil(rows/b0), ceil(cols/b1)] float32: a Decoder.  Tables are made for the blocks that
    are asked for, so that small blocks cost no more memory than their values."""

    def __init__(
        self, scales: NDArray[np.float32], block: tuple[int, int], dtype: np.dtype[Any], matrix: str = ""
    ) -> None:
        self.scales, self.block, self.dtype, self.matrix = scales.astype(np.float32), block, dtype, matrix
        with np.errstate(over="ignore"):
            self._fits = bool(np.isfinite(np.abs(self.scales) * LARGEST).all())

    def check(self, codes: NDArray[np.uint8]) -> None:
        if bad := count_nan(codes):
            raise CheckpointError(
                f"{self.matrix}: {bad} of its FP8 codes are no number (0x7f or 0xff).",
                "Download the file that holds it again; a sound checkpoint has none.",
            )

    def rows(self, codes: NDArray[np.uint8], first: int, out: Array) -> int:
        if self.dtype == np.float32 and self._fits:
            kernels.scaled(codes, CODES, self.scales, first, *self.block, out.view(np.float32))
            return 0
        tables, top, _ = self._tables(first, 0, codes.shape)
        kernels.look_up(codes, tables, top, *self.block, out)
        return self._lost(codes, tables, top, 0)

    def largest(self, codes: NDArray[np.uint8], first: int) -> NDArray[np.float32] | None:
        """Of a block's values the largest is that of its largest code: rounding keeps their order."""
        if self.dtype != np.float32 or not self._fits:
            return None
        rows, columns = self.block
        found = np.empty((len(codes), -(-codes.shape[1] // columns)), np.uint8)
        kernels.largest_codes(codes, columns, found)
        if found.max(initial=0) == NAN:
            self.check(codes)
        scales = np.abs(self.scales[(first + np.arange(len(codes))) // rows])
        largest: NDArray[np.float32] = (CODES[found] * scales).max(1, keepdims=True, initial=0)
        return largest

    def encode(self, codes: NDArray[np.uint8], first: int, divisors: NDArray[np.float32], out: Array) -> None:
        kernels.encode_fp8(codes, self.scales, divisors, first, *self.block, out)

    def transposed(self, codes: NDArray[np.uint8], top: int, left: int, out: Array) -> int:
        tables, top, left = self._tables(top, left, codes.shape)
        kernels.look_up_transposed(codes, tables, top, left, *self.block, out)
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
    step = max(1, CHECKED_BYTES // max(1, codes.shape[-1]))
    blocks = (codes[i : i + step] & 0x7F for i in range(0, len(codes), step))
    return sum(int(np.count_nonzero(block == NAN)) for block in blocks if block.max(initial=0) == NAN)


def dequantise(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], block: tuple[int, int], dtype: np.dtype[Any]
) -> Array:
    """A whole matrix: codes [R, C] and scales -> values [R, C] of `dtype`."""
    out = np.empty(codes.shape, f"u{dtype.itemsize}")
    Blocks(scales, block, dtype).rows(codes, 0, out)
    return out.view(dtype)
