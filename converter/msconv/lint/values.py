"""The numbers of tensors, checked while they are read once, in pieces: values, codes, and what scales codes.

A check sees a tensor's bytes in order and says at the end what is wrong.  Scales are held against the codes of
their rows: a scale alone can look right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.dtypes import DTYPES, VALUE_DTYPES, is_float

from ..layout.cuts import matrix
from ..layout.model import TensorInfo
from ..quant.record import Holds
from ..quant.scales import USED, faults
from ..quant.w8a8 import DEQ_SCALES, INPUT_OFFSET, INPUT_SCALE, LARGEST, QUANT_BIAS, SCALES
from .blocks import ELEMENT, ENDING, Blocks, fits_blocks
from .findings import Findings

Array = NDArray[Any]
Read = Callable[[str], Array | None]  # a small tensor by its name, as numbers; None if there is none

EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # bits of infinity
NAN_E4M3 = 0x7F
LEAST_REACH = 64  # of a row's codes: half of their range
LEAST_E4M3 = 0x6E  # the code of 112, a quarter of the range
FAR_ABOVE, FAR_BELOW = 1e3, 1e-6  # the median of the rows' largest values
LARGEST_MEDIAN, LEAST_MEDIAN = 1e3, 1e-9  # what no model's weights are like
ROUNDING = 2.0**-22  # of sums that a tool made in float32

HOLDS: Mapping[str, Holds] = {
    ".weight_scale": "scales",
    ".deq_scale": "scales",
    ENDING: "scales",
    ".input_scale": "input scale",
    ".input_offset": "input offset",
}
OFFSET = ".weight_offset"
NONZERO = "a weight's offset is not zero: no graph has an offset for weights"


class Check(Protocol):
    """Looks at one tensor.  `width`: elements that must come together."""

    width: int

    def see(self, words: Array) -> None:
        """The next elements, as unsigned words of their width."""

    def end(self) -> None:
        """All were seen."""


@dataclass
class Magnitudes:
    """Numbers without their signs, as words in the numbers' order.  From `limit` on they are no numbers."""

    name: str
    findings: Findings
    limit: int
    width: int = 1
    seen: int = 0
    bad: int = 0
    first_bad: int = -1
    largest: int = 0

    def see(self, words: Array) -> None:
        sizes = words & words.dtype.type((1 << (8 * words.itemsize - 1)) - 1)
        largest = int(sizes.max(initial=0))
        if largest >= self.limit:
            places = np.flatnonzero(sizes >= self.limit)
            self.first_bad = self.seen + int(places[0]) if self.first_bad < 0 else self.first_bad
            self.bad += len(places)
        self.largest = max(self.largest, largest)
        self.seen += len(words)

    def tell_bad(self, kind: str, what: str) -> None:
        where = f"{self.bad} of {self.seen} in {self.name}, from element {self.first_bad} on"
        self.findings.add("error", kind, what, [self.name], where)


@dataclass
class Values(Magnitudes):
    """Values: all of them must be numbers."""

    is_matrix: bool = False

    def end(self) -> None:
        if self.bad:
            self.tell_bad("values", "values are NaN or infinite")
        elif self.is_matrix and not self.largest:
            self.findings.add("warning", "values", "all values are zero", [self.name])


@dataclass
class Fp8Codes(Magnitudes):
    """e4m3 codes in blocks.  `blocks`: their scales, where those have to be held against them."""

    blocks: Blocks | None = None

    def see(self, words: Array) -> None:
        super().see(words)
        if self.blocks:
            self.blocks.see(words)

    def end(self) -> None:
        if self.blocks:
            self.blocks.end(self.findings)
        if self.bad:
            self.tell_bad("codes", "FP8 codes stand for NaN")
        elif self.largest < LEAST_E4M3:
            self.findings.add("warning", "codes", "FP8 codes use less than a quarter of their range", [self.name])


class Int8Codes:
    """int8 codes, row by row, and the scales of the rows."""

    def __init__(self, name: str, info: TensorInfo, read: Read, has_biases: bool, findings: Findings) -> None:
        self.name, self.read, self.findings, self.has_biases = name, read, findings, has_biases
        rows, self.width = matrix(info.shape)
        self.most, self.least = np.zeros(rows, np.int16), np.zeros(rows, np.int16)
        self.is_static = read(QUANT_BIAS.of(name)) is not None
        self.sums = np.zeros(rows if self.is_static else 0, np.int64)
        self.row = 0

    def see(self, words: Array) -> None:
        codes = words.view(np.int8).reshape(-1, self.width)
        rows = slice(self.row, self.row + len(codes))
        self.most[rows], self.least[rows] = codes.max(1, initial=0), codes.min(1, initial=0)
        if self.is_static:
            self.sums[rows] = codes.sum(1, dtype=np.int32)
        self.row += len(codes)

    def end(self) -> None:
        name, add = self.name, self.findings.add
        reach = np.maximum(self.most, -self.least)
        if not reach.any():
            add("warning", "codes", "all codes are zero", [name])
            return
        if (below := int((self.least < -LARGEST).sum())) > 0:
            add(
                "note",
                "codes",
                "codes reach -128, one further than they reach up",
                [name],
                f"{below} rows of {name}",
            )
        narrow = np.flatnonzero((reach > 0) & (reach < LEAST_REACH))
        if len(narrow):
            first = f"{len(narrow)} of {len(reach)} rows of {name}, row {narrow[0]} to {reach[narrow[0]]} of 127"
            add("warning", "codes", "codes use less than half of their range", [name], first)
        for of in (SCALES, DEQ_SCALES):
            if (scales := self._scales(of.of(name))) is not None and len(scales) == len(reach):
                self._hold(of.of(name), reach, scales)
        if self.is_static:
            self._check_bias()

    def _scales(self, name: str) -> Array | None:
        scales = self.read(name)
        return None if scales is None else scales.reshape(-1).astype(np.float64)

    def _hold(self, name: str, reach: Array, scales: Array) -> None:
        """Scales against the codes of their rows: none of 0, and the rows' largest values against each other and
        against what weights are like."""
        if len(lost := np.flatnonzero((scales == 0) & (reach > 0))):
            first = f"{len(lost)} of {len(scales)} in {name}, that of row {lost[0]}"
            self.findings.add("error", "scales", f"{USED.fault}, and their codes are not", [name], first)
        if name.endswith(".deq_scale"):
            of_input = self.read(INPUT_SCALE.of(self.name))
            if of_input is None or of_input.size != 1 or not float(of_input.reshape(-1)[0]) > 0:
                return
            scales = scales / float(of_input.reshape(-1)[0])
        with np.errstate(invalid="ignore"):
            largest = reach * scales
        used = (reach > 0) & np.isfinite(largest) & (largest > 0)
        if not used.any():
            return
        middle = float(np.median(largest[used]))
        if not LEAST_MEDIAN < middle < LARGEST_MEDIAN:
            text = "scales are absurd: no model has such weights"
            self.findings.add("error", "scales", text, [name], f"the median row of {name} reaches {middle:.3g}")
            return
        far = np.flatnonzero(used & ((largest > FAR_ABOVE * middle) | (largest < FAR_BELOW * middle)))
        if len(far):
            first = f"row {far[0]} of {name} reaches {largest[far[0]]:.3g}, the median row {middle:.3g}"
            self.findings.add("warning", "scales", "a scale is absurd against those of other rows", [name], first)

    def _check_bias(self) -> None:
        """quant_bias takes out what the input's offset adds: -offset * sum of the codes, and a bias if any."""
        bias, offset = self.read(QUANT_BIAS.of(self.name)), self.read(INPUT_OFFSET.of(self.name))
        if self.has_biases or bias is None or offset is None or (bias.size, offset.size) != (len(self.sums), 1):
            return
        if any(faults("input offset", offset.reshape(-1))):
            return
        wanted = -round(float(offset.reshape(-1)[0])) * self.sums
        bias = bias.reshape(-1).astype(np.int64)
        bad = np.flatnonzero(np.abs(bias - wanted) > 1 + ROUNDING * np.abs(wanted))
        if len(bad):
            row = int(bad[0])
            first = f"row {row} of {self.name} has {bias[row]}, its codes give {wanted[row]}"
            text = "quant_bias is not what codes and offset give, and the model has no biases"
            self.findings.add("warning", "scales", text, [QUANT_BIAS.of(self.name)], first)


@dataclass
class Companion:
    """Scales, offsets and the like: small, so they are looked at whole.  `is_held`: those of 0 are held against
    codes."""

    name: str
    read: Read
    findings: Findings
    of_experts: bool
    is_held: bool
    width: int = 1

    def see(self, words: Array) -> None:
        """Read whole at the end."""

    def end(self) -> None:
        numbers = self.read(self.name)
        if numbers is None or not numbers.size:
            return
        numbers = numbers.reshape(-1)
        if self.name.endswith(OFFSET):
            self._say(np.flatnonzero(numbers).tolist(), numbers, NONZERO)
            return
        holds = HOLDS[next(ending for ending in HOLDS if self.name.endswith(ending))]
        for rule, places in faults(holds, numbers):
            self._say(places, numbers, rule.fault)
        if holds == "scales" and not self.is_held:
            self._say(np.flatnonzero(USED.breaks(numbers)).tolist(), numbers, USED.fault)
        is_grouped = self.of_experts and self.name.endswith(".weight_scale")
        if is_grouped and (numbers.view(np.uint32) & np.uint32(0xFFFF)).any():
            text = "scales of experts are no bfloat16 values: Ascend's grouped product rounds them"
            self.findings.add("note", "scales", text, [self.name])

    def _say(self, places: list[int], numbers: Array, text: str) -> None:
        if places:
            first = f"{len(places)} of {len(numbers)} in {self.name}, entry {places[0]} is {numbers[places[0]]}"
            self.findings.add("error", "scales", text, [self.name], first)


@dataclass(frozen=True)
class Surroundings:
    """What checks of one tensor have to know of others.  `block`: of FP8 codes with one scale, if that is known;
    `dtype`: as which they are decoded."""

    tensors: Mapping[str, TensorInfo]
    read: Read
    block: tuple[int, int] | None
    dtype: str

    def holds_zeros(self, name: str) -> bool:
        """Whether the check of the codes that these scales are of looks at those of 0."""
        if name.endswith(".deq_scale"):
            codes = self.tensors.get(name.removesuffix(".deq_scale") + ".weight")
        else:
            codes = self.tensors.get(name.removesuffix("_inv").removesuffix("_scale"))
        if codes is not None and codes.dtype == ELEMENT:
            return fits_blocks(codes, self.tensors, self.block)
        return codes is not None and _is_int8(codes) and prod(self.tensors[name].shape) == codes.shape[0]


def _is_int8(info: TensorInfo) -> bool:
    return info.dtype == "int8" and info.name.endswith(".weight") and len(info.shape) > 1


def check_for(info: TensorInfo, around: Surroundings, findings: Findings) -> Check | None:
    """What looks at this tensor; None if nothing is known of such."""
    name, tensors, read = info.name, around.tensors, around.read
    if name.endswith((*HOLDS, OFFSET)) and (is_float(info.dtype) or info.dtype == "int64"):
        return Companion(name, read, findings, ".experts." in name, around.holds_zeros(name))
    if info.dtype in VALUE_DTYPES:
        return Values(name, findings, EXPONENT[info.dtype], is_matrix=len(info.shape) > 1)
    if info.dtype == ELEMENT:
        codes = Fp8Codes(name, findings, NAN_E4M3)
        scales = read(name + ENDING) if fits_blocks(info, tensors, around.block) else None
        if scales is not None and around.block is not None:
            blocks = Blocks(info, scales, around.block, around.dtype)
            if blocks.is_needed:
                codes.blocks, codes.width = blocks, blocks.width
        return codes
    if _is_int8(info):
        has_biases = any(n.endswith(".bias") for n in tensors)
        return Int8Codes(name, info, read, has_biases, findings)
    return None


def as_numbers(words: Array, info: TensorInfo) -> Array:
    """A companion's numbers: int64 that holds float32's bits becomes those."""
    if info.dtype == "int64" and info.name.endswith(".deq_scale"):
        whole = words.view(np.int64)
        found: Array = (whole & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        return np.where((whole >> 32) == 0, found, np.float32(np.nan))
    numbers: Array = words.view(DTYPES[info.dtype].numpy)
    return numbers.astype(np.float32) if is_float(info.dtype) else numbers
