"""W8A8: weights int8 with one scale a row of the matrix, activations int8.

Two formats.  Dynamic: each row of activations (a token) gets a scale of its own while the graph runs,
`t = max|x| / 127`, and `y = (codes of x . codes of W) * weight_scale * t`.  Static: all of an input's activations
have one scale and offset, found by calibration; `y = (codes of x . codes of W + quant_bias) * deq_scale`, and
quant_bias takes the offset out again.  Codes are rounded half to even; products of whole numbers are exact.

The names and the arithmetic are those of Ascend's ModelSlim and of the aclnn operators DynamicQuant, Quant and
QuantMatmulV4 (CANN 8.2 to 8.5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from .record import Stored, WeightFormat

CODES = Stored("{matrix}", lambda rows, columns: (rows, columns), "int8")
SCALES = Stored("{matrix}_scale", lambda rows, columns: (rows, 1), "float32", "rows")
DEQ_SCALES = Stored("{module}.deq_scale", lambda rows, columns: (rows,), "float32", "rows")
QUANT_BIAS = Stored("{module}.quant_bias", lambda rows, columns: (rows,), "int32", "sums")
INPUT_SCALE = Stored("{module}.input_scale", lambda rows, columns: (1,), "float32", "input")
INPUT_OFFSET = Stored("{module}.input_offset", lambda rows, columns: (1,), "float32", "input")


@dataclass(frozen=True, slots=True)
class W8A8Dynamic(WeightFormat):
    """Activations get their scales while the graph runs."""

    name = "w8a8-dynamic"
    title = "int8 (W8A8, a scale a token)"
    method = "modelslim"
    element = "int8"

    @classmethod
    def read(cls, config: Mapping[str, object], problems: list[str]) -> Self | None:
        return None

    @property
    def sources(self) -> tuple[Stored, ...]:
        return (CODES, SCALES)

    @property
    def stored(self) -> tuple[Stored, ...]:
        return self.sources

    def multiply(self, ops: Any) -> Any:
        return ops.dynamic_product()

    def multiply_experts(self, ops: Any) -> Any:
        return ops.dynamic_experts_product()

    def reference(self, matrix: str, read: Callable[[str], Any], rounds: Callable[[Any], Any]) -> Any:
        return read(matrix) * read(SCALES.of(matrix))


@dataclass(frozen=True, slots=True)
class W8A8Static(WeightFormat):
    """One scale and offset for all activations of an input."""

    name = "w8a8-static"
    title = "int8 (W8A8, one scale an input)"
    method = "modelslim"
    element = "int8"

    @classmethod
    def read(cls, config: Mapping[str, object], problems: list[str]) -> Self | None:
        return None

    @property
    def sources(self) -> tuple[Stored, ...]:
        return (CODES, DEQ_SCALES, QUANT_BIAS, INPUT_SCALE, INPUT_OFFSET)

    @property
    def stored(self) -> tuple[Stored, ...]:
        return self.sources

    def multiply(self, ops: Any) -> Any:
        return ops.static_product()

    def multiply_experts(self, ops: Any) -> Any:
        return ops.static_experts_product()

    def reference(self, matrix: str, read: Callable[[str], Any], rounds: Callable[[Any], Any]) -> Any:
        return read(matrix) * (read(DEQ_SCALES.of(matrix)) / read(INPUT_SCALE.of(matrix))).reshape(-1, 1)
