"""Which numbers codes can be scaled with: one definition, for conversion and for `lint`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.dtypes import DTYPES
from msconv_runtime.errors import CheckpointError

from .record import Array, Holds, Stored, WeightFormat

LEAST_CODE, MOST_CODE = -128, 127  # of an input's offset: it is added to codes
SIZE_BITS: Mapping[str, int] = {"float8_e4m3fn": 0x7F}  # 0x80 is zero too
HINT = "`msconv lint` lists all such numbers. Download the file that holds it again, or quantise the model again."


@dataclass(frozen=True, slots=True)
class Rule:
    """`fault`: what is said of several numbers that break it; `need`: of one."""

    fault: str
    need: str
    breaks: Callable[[Array], NDArray[np.bool_]]


def _is_no_code(numbers: Array) -> NDArray[np.bool_]:
    is_code: NDArray[np.bool_] = (numbers == np.rint(numbers)) & (numbers >= LEAST_CODE) & (numbers <= MOST_CODE)
    return ~is_code


FINITE = Rule("scales are NaN or infinite", "it has to be a finite number", lambda n: ~np.isfinite(n))
NOT_NEGATIVE = Rule("scales are negative", "it must not be below 0", lambda n: n < 0)
ABOVE_ZERO = Rule("scales are zero", "it has to be above 0", lambda n: n == 0)  # of an input
A_CODE = Rule(
    f"an input's offset is no whole number from {LEAST_CODE} to {MOST_CODE}",
    f"it has to be a whole number from {LEAST_CODE} to {MOST_CODE}",
    _is_no_code,
)
USED = Rule("scales are zero", "its codes are not all 0", lambda n: n == 0)  # to be held against codes
RULES: Mapping[Holds, tuple[Rule, ...]] = {
    "": (),
    "scales": (FINITE, NOT_NEGATIVE),
    "input scale": (FINITE, NOT_NEGATIVE, ABOVE_ZERO),
    "input offset": (A_CODE,),
}


def faults(holds: Holds, numbers: Array) -> Iterator[tuple[Rule, list[int]]]:
    """The rules that some of these numbers [N] break, and where those are."""
    for rule in RULES[holds]:
        if places := np.flatnonzero(rule.breaks(numbers)).tolist():
            yield rule, places


def as_numbers(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Bytes of a tensor of scales as numbers [N].  Of int64 the lower half is the bits of float32."""
    if dtype == "int64":
        return data.view(np.int64).astype(np.uint32).view(np.float32)
    return data.view(DTYPES[dtype].numpy).astype(np.float32)


def refuse_numbers(name: str, stored: Stored, numbers: Array, first: int = 0) -> None:
    """Raises CheckpointError for the first of the numbers [N] that cannot be right.  `first`: the row of the
    first."""
    for rule, places in faults(stored.holds, numbers):
        what = f"the scale of row {first + places[0]}" if stored.holds == "scales" else f"the {stored.holds}"
        raise refusal(name, what, numbers[places[0]], rule)


def refuse_blocks(name: str, scales: Array) -> None:
    """The same for scales of blocks [bands, blocks]."""
    for rule, places in faults("scales", scales.reshape(-1)):
        band, block = divmod(places[0], scales.shape[1])
        raise refusal(name, f"the scale of block [{band}, {block}]", scales[band, block], rule)


def refusal(name: str, what: str, number: Any, rule: Rule) -> CheckpointError:
    return CheckpointError(f"{name}: {what} is {float(number):.7g}: {rule.need}.", HINT)


class ZeroScales:
    """A matrix's scales of 0, held against its codes as those pass: where one is not 0, its value is lost.

    `scales`: [bands, blocks], each of `block` = (rows, columns); 0 columns: a whole row.
    """

    def __init__(self, scales: Array, block: tuple[int, int], element: str) -> None:
        self.zero: NDArray[np.bool_] = scales == 0
        self.block, self.bits = block, np.uint8(SIZE_BITS.get(element, 0xFF))

    def used(self, codes: NDArray[np.uint8], first: int) -> list[tuple[int, int]]:
        """(band, block) of those whose codes [R, C], rows of the matrix from `first` on, are not all 0."""
        rows, columns = self.block[0], self.block[1] or codes.shape[1]
        bands = (first + np.arange(len(codes))) // rows
        found: dict[tuple[int, int], None] = {}
        for row, block in np.argwhere(self.zero[bands]).tolist():
            place = (int(bands[row]), block)
            if place not in found and (codes[row, block * columns : (block + 1) * columns] & self.bits).any():
                found[place] = None
        return list(found)


def zero_scales(chosen: WeightFormat, shape: tuple[int, int], scales: Array) -> ZeroScales | None:
    """Of a matrix [R, C] in this format, with numbers [N]; None if no scale is 0."""
    if scales.all():
        return None
    columns = chosen.scale_block[1]
    blocks = -(-shape[1] // columns) if columns else 1
    return ZeroScales(scales.reshape(-1, blocks), chosen.scale_block, chosen.element)


def refuse_used(name: str, zeros: ZeroScales, codes: NDArray[np.uint8], first: int) -> None:
    """Raises CheckpointError for the first scale of 0, of the tensor `name`, whose codes are not."""
    for band, block in zeros.used(codes, first):
        what = f"the scale of block [{band}, {block}]" if zeros.block[1] else f"the scale of row {band}"
        raise refusal(name, what, 0, USED)
