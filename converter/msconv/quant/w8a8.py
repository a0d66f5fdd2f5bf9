"""W8A8: weights int8 with one scale a row of the matrix, activations int8.

Two formats.  Dynamic: each row of activations (a token) gets a scale of its own while the graph runs,
`t = max|x| / 127`, and `y = (codes of x . codes of W) * weight_scale * t`.  Static: all of an input's activations
have one scale and offset, found by calibration; `y = (codes of x . codes of W + quant_bias) * deq_scale`, and
quant_bias takes the offset out again.  Codes are rounded half to even; products of whole numbers are exact.

The names and the arithmetic are those of Ascend's ModelSlim and of the aclnn operators DynamicQuant, Quant and
QuantMatmulV4 (CANN 8.2 to 8.5).  ModelSlim's description says which matrix has which, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from msconv_runtime.errors import CheckpointError

from . import kernels, modelslim
from .record import Array, Decoder, Header, LeftOut, MadeFormat, Stored, WeightFormat

CODES = Stored("{matrix}", lambda rows, columns: (rows, columns), "int8")
SCALES = Stored("{matrix}_scale", lambda rows, columns: (rows, 1), "float32", "rows", holds="scales")
DEQ_SCALES = Stored(
    "{module}.deq_scale", lambda rows, columns: (rows,), "float32", "rows", bits="int64", holds="scales"
)
QUANT_BIAS = Stored("{module}.quant_bias", lambda rows, columns: (rows,), "int32", "sums")
INPUT_SCALE = Stored("{module}.input_scale", lambda rows, columns: (1,), "float32", "input", holds="input scale")
INPUT_OFFSET = Stored(
    "{module}.input_offset", lambda rows, columns: (1,), "float32", "input", holds="input offset"
)

LARGEST = 127  # of a code that is made here; ModelSlim's reach -128
SMALLEST_SCALE = 2.0**-126  # of a row of zeros

DYNAMIC_TYPES = ("W8A8_DYNAMIC", "W8A8_MIX")
MIX = "W8A8_MIX: served with a scale a token, in prompts and in decoding, as vllm-ascend serves it"
ZERO = "offset of symmetric codes: zero"


def shares(total: Array, sums: Array, offset: float) -> Array:
    """Of a quant_bias, [O] int32, each rank's share, [ranks, O]: it takes out what the input's offset adds to its
    own columns; what is left, a bias, is on rank 0.  `sums`: of each rank's columns of the codes, [ranks, O]."""
    found = -round(offset) * sums.astype(np.int64)
    found[0] += total.astype(np.int64) - found.sum(0)
    return found.astype(np.int32)


@dataclass(frozen=True, slots=True)
class _W8A8(WeightFormat):
    """What both have in common.  `types`: of a checkpoint's tensors, by ModelSlim.  `own`: those of a matrix in
    this format; `sign`: the tensor that tells it where nothing is described."""

    types: Mapping[str, str] = field(default_factory=dict, compare=False)

    method = modelslim.METHOD
    element = "int8"
    has_values: ClassVar[bool] = False
    rounds_input: ClassVar[bool] = True
    keys = modelslim.KEYS
    own: ClassVar[tuple[str, ...]]
    sign: ClassVar[Stored]

    @classmethod
    def read(cls, config: Mapping[str, object], problems: list[str]) -> Self | None:
        if config.get("quant_method") != cls.method:
            return None
        return cls(modelslim.read(config, problems))

    def claims(self, matrix: str, headers: Mapping[str, Header]) -> bool:
        is_own = self.types.get(matrix) in self.own if self.types else self.sign.of(matrix) in headers
        return is_own and headers[matrix].dtype == self.element

    @property
    def stored(self) -> tuple[Stored, ...]:
        return self.sources


@dataclass(frozen=True, slots=True)
class W8A8Dynamic(_W8A8, MadeFormat):
    """Activations get their scales while the graph runs."""

    name = "w8a8-dynamic"
    title = "int8 (W8A8, a scale a token)"
    own = DYNAMIC_TYPES
    sign = SCALES

    def expects(self, matrix: str) -> bool:
        return not self.types or self.types.get(matrix) in self.own

    @property
    def sources(self) -> tuple[Stored, ...]:
        return (CODES, SCALES)

    def left_out(self, matrix: str) -> tuple[LeftOut, ...]:
        static = (DEQ_SCALES, QUANT_BIAS, INPUT_SCALE, INPUT_OFFSET)
        return (LeftOut(f"{matrix}_offset", ZERO, is_zero=True), *(LeftOut(s.of(matrix), MIX) for s in static))

    def disagreements(self, headers: Mapping[str, Header]) -> list[str]:
        return modelslim.disagreements(self.types, headers)

    def multiply(self, ops: Any) -> Any:
        return ops.dynamic_product()

    def multiply_experts(self, ops: Any) -> Any:
        return ops.dynamic_experts_product()

    def encode(self, matrix: str, values: NDArray[np.float32], out: Array) -> Array:
        """The scale is the row's largest magnitude / 127, rounded to bfloat16: Ascend's grouped product takes no
        other.  Codes are made with the rounded one."""
        scales = np.empty((len(values), 1), np.float32)
        kernels.largest_magnitudes(values, scales)
        self._round_scales(matrix, scales)
        kernels.encode(values, scales, out)
        return scales

    def encode_decoded(
        self, matrix: str, decoder: Decoder, codes: NDArray[np.uint8], first: int, out: Array
    ) -> Array | None:
        scales = decoder.largest(codes, first)
        if scales is not None:
            self._round_scales(matrix, scales)
            decoder.encode(codes, first, scales, out)
        return scales

    def _round_scales(self, matrix: str, scales: NDArray[np.float32]) -> None:
        """Largest magnitudes -> scales, in their place."""
        if not np.isfinite(scales).all():
            bad = int(np.flatnonzero(~np.isfinite(scales))[0])
            raise CheckpointError(
                f"{matrix}: holds values that are no finite numbers (row {bad} of a block of rows).",
                "Download the file that holds it again; a sound checkpoint has none.",
            )
        scales[:] = np.maximum((scales / LARGEST).astype(ml_dtypes.bfloat16).astype(np.float32), SMALLEST_SCALE)

    def reference(self, matrix: str, read: Callable[[str], Any], rounds: Callable[[Any], Any]) -> Any:
        return read(matrix) * read(SCALES.of(matrix))


@dataclass(frozen=True, slots=True)
class W8A8Static(_W8A8):
    """One scale and offset for all activations of an input."""

    name = "w8a8-static"
    title = "int8 (W8A8, one scale an input)"
    of_experts: ClassVar[bool] = False
    own = ("W8A8",)
    sign = DEQ_SCALES

    def expects(self, matrix: str) -> bool:
        return self.types.get(matrix) in self.own

    @property
    def sources(self) -> tuple[Stored, ...]:
        return (CODES, DEQ_SCALES, QUANT_BIAS, INPUT_SCALE, INPUT_OFFSET)

    def left_out(self, matrix: str) -> tuple[LeftOut, ...]:
        reason = "deq_scale is this times the input's scale"
        return (LeftOut(SCALES.of(matrix), reason), LeftOut(f"{matrix}_offset", ZERO, is_zero=True))

    def multiply(self, ops: Any) -> Any:
        return ops.static_product()

    def multiply_experts(self, ops: Any) -> Any:
        return ops.static_experts_product()

    def reference(self, matrix: str, read: Callable[[str], Any], rounds: Callable[[Any], Any]) -> Any:
        return read(matrix) * (read(DEQ_SCALES.of(matrix)) / read(INPUT_SCALE.of(matrix))).reshape(-1, 1)
