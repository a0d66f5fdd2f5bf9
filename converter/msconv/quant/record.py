"""The record of a weight format: how a matrix is stored, in a checkpoint and in an artifact, and multiplied by.

A format is one file in this directory with a class of its own.  Nothing here knows a model, a rank or a disk, and
no framework is imported before a method that needs it is called."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Along = Literal["matrix", "rows", "sums", "input", "whole"]
Holds = Literal["", "scales", "input scale", "input offset"]


@dataclass(frozen=True, slots=True)
class Stored:
    """One of the tensors that a matrix is stored as.

    `name`: with `{matrix}` for the matrix's own name (`...q_proj.weight`), or `{module}` for what comes before its
    last dot.  `shape`: from the matrix's rows and columns.  `dtype`: its element type, "" for that of the
    artifact's values.  `along`: what its entries belong to, and so how they are cut: `matrix`, as the matrix is;
    `rows`, one entry or row of entries for each row of the matrix, in the same order; `sums`, likewise, but each
    a sum over the matrix's columns, and divided over ranks as they are; `input`, the input of the product, which
    matrices that are joined share; `whole`, all of them on every rank.  `bits`: the element type of whole numbers
    as which a checkpoint may have it, twice as wide, with its bits in their lower half.  `holds`: what its numbers
    are, and so which of them cannot be right (`scales.RULES`)."""

    name: str
    shape: Callable[[int, int], tuple[int, ...]]
    dtype: str = ""
    along: Along = "matrix"
    bits: str = ""
    holds: Holds = ""

    def of(self, matrix: str) -> str:
        """Its name, for the matrix of that name."""
        return self.name.format(matrix=matrix, module=matrix.rpartition(".")[0])

    def local_shape(self, matrix: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape for a matrix [out, inner], or for experts' matrices [E, inner, out]: those are transposed, and
        so is what belongs to them."""
        if len(matrix) == 2:
            return self.shape(*matrix)
        experts, inner, out = matrix
        return (experts, *reversed(self.shape(out, inner)))


MATRIX = Stored("{matrix}", lambda rows, columns: (rows, columns))


class Kept:
    """How a matrix is kept in an artifact, and how a graph multiplies by it.  This one: as its values."""

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The tensors of the artifact; the first has the matrix's own name."""
        return (MATRIX,)

    def tensors(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], str]]:
        """(parameter name, shape, element type) of each tensor that a graph reads, for a matrix [out, inner] or
        experts' matrices [E, inner, out], sizes of one rank.  Element type "": the one that the target stores
        matrices in."""
        return [(t.of(name), t.local_shape(shape), t.dtype) for t in self.stored]

    def values(self, ops: Any) -> Any | None:
        """What a graph calls as (*tensors) -> the matrix, or the experts' matrices, in `ops.dtype`.  Called once
        for each matrix, while the graph is built; `ops` are the operations of a target.  None: the first tensor
        has the values."""
        return None

    def multiply(self, ops: Any) -> Any:
        """What a graph calls as (x [T, inner], *tensors of a matrix [out, inner]) -> [T, out]; called as `values`
        is.  Where a target has no product of its own for codes, their values are multiplied."""
        decode = self.values(ops)
        return ops.product() if decode is None else ops.product_with(decode)

    def multiply_experts(self, ops: Any) -> Any:
        """The same for experts' matrices [E, inner, out]: what a graph calls as (x, places, *tensors).  What `x`
        and `places` are, which say each row's expert, only the target's operations know."""
        decode = self.values(ops)
        return ops.experts_product() if decode is None else ops.experts_product_with(decode)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor of a checkpoint that an artifact does without, and why.  `twin`: another that must hold the same
    bytes, or leaving it out would lose something; `is_zero`: all of it must be 0, for the same reason."""

    name: str
    reason: str
    twin: str = ""
    is_zero: bool = False


class Header(Protocol):
    """What a safetensors header says of a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Decoder(Protocol):
    """Codes of one matrix -> values, as bit patterns of the output's element type, piece by piece."""

    def check(self, codes: NDArray[np.uint8]) -> None:
        """Raises CheckpointError if a code stands for no number."""

    def rows(self, codes: NDArray[np.uint8], first: int, out: Array) -> int:
        """Rows of the matrix from `first` on: codes [R, C] -> [R, C].  Returns how many of them are numbers that
        the output's type cannot hold."""

    def largest(self, codes: NDArray[np.uint8], first: int) -> NDArray[np.float32] | None:
        """The largest magnitude of each of these rows, [R, 1].  None: `encode` cannot be used, as values may be
        none that float32 holds.  Raises CheckpointError if a code stands for no number."""

    def encode(self, codes: NDArray[np.uint8], first: int, divisors: NDArray[np.float32], out: Array) -> None:
        """The values of these rows / divisors [R, 1], rounded half to even, from -127 to 127: codes [R, C] ->
        [R, C] int8, in other memory."""

    def transposed(self, codes: NDArray[np.uint8], top: int, left: int, out: Array) -> int:
        """The rectangle that begins at (top, left), transposed: codes [R, C] -> [C, R].  Returns as `rows`."""


class WeightFormat(Kept, ABC):
    """A weight format, as a configuration describes it.  Frozen; made without arguments it is the format of a
    checkpoint whose configuration does not say more than its name.

    `name`: in the manifest.  `title`: for people.  `method`: what `quant_method` calls it.  `element`: the element
    type of its codes.  `of_experts`: experts' matrices may be stored in it.  `has_values`: graphs may read it as
    values, not only multiply by it.  `rounds_input`: what is multiplied by it becomes codes too.  `keys` of a
    `quantization_config` that `read` obeys; those in `harmless` change nothing, for the reason there.  Every other
    key is refused.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    method: ClassVar[str]
    element: ClassVar[str]
    of_experts: ClassVar[bool] = True
    has_values: ClassVar[bool] = True
    rounds_input: ClassVar[bool] = False
    keys: ClassVar[frozenset[str]] = frozenset({"quant_method"})
    harmless: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @abstractmethod
    def read(cls, config: Mapping[str, object], problems: list[str]) -> Self | None:
        """The format that a `quantization_config` describes; None if that is another.  What cannot be obeyed is
        added to `problems`."""

    def claims(self, matrix: str, headers: Mapping[str, Header]) -> bool:
        """Whether the matrix of this name is stored in this format."""
        return headers[matrix].dtype == self.element

    @property
    @abstractmethod
    def sources(self) -> tuple[Stored, ...]:
        """The tensors of a checkpoint; the first has the matrix's own name."""

    @property
    def scale_block(self) -> tuple[int, int]:
        """Rows and columns of the codes that one of its scales is of; 0 columns: a whole row."""
        return (1, 0)

    @property
    def needs(self) -> str:
        """What wants the other tensors, for messages: "blocks of 128x128"."""
        return f"{self.title} codes"

    @property
    def is_kept(self) -> bool:
        """Whether an artifact has its codes as they are; else they are decoded while they are converted."""
        return self.stored[0].dtype != ""

    @property
    def kept_as(self) -> WeightFormat:
        """The format in which an artifact has it, where several checkpoints' formats become one."""
        return self

    def expects(self, matrix: str) -> bool:
        """Whether the configuration says that the matrix of this name is stored so."""
        return True

    def left_out(self, matrix: str) -> tuple[LeftOut, ...]:
        """Tensors that a checkpoint may have besides, of the matrix of this name, and that nothing reads."""
        return ()

    def disagreements(self, headers: Mapping[str, Header]) -> list[str]:
        """What a checkpoint's configuration says of its tensors and their headers do not bear out."""
        return []

    def companions(self, matrix: str) -> tuple[str, ...]:
        """Names of a checkpoint's other tensors of the matrix."""
        return tuple(s.of(matrix) for s in self.sources[1:])

    def decoder(self, matrix: str, companions: Sequence[Array], dtype: np.dtype[Any]) -> Decoder | None:
        """The decoder of one matrix, from its companions' values, to `dtype`.  None: nothing is decoded.  Raises
        CheckpointError for companions that cannot be right."""
        return None

    def decoder_bytes(self, shape: tuple[int, ...], chunk: int, is_transposed: bool) -> int:
        """What a decoder takes besides its data, while it makes `chunk` values of a matrix of this shape."""
        return 0

    @abstractmethod
    def reference(self, matrix: str, read: Callable[[str], Any], rounds: Callable[[Any], Any]) -> Any:
        """The values in float32, a torch tensor, by another way than the decoder's.  `read` gives a checkpoint's
        tensor of some name as float32, `rounds` values as conversion rounds them."""


class MadeFormat(WeightFormat):
    """One that is not only read but made of values: `--quant` names it."""

    @abstractmethod
    def encode(self, matrix: str, values: NDArray[np.float32], out: Array) -> Array:
        """Rows of a matrix [R, C] as codes, into `out` [R, C], each row by itself; returns what each has besides,
        [R, 1], as `stored` wants it.  Raises CheckpointError for values that have no code."""

    def encode_decoded(
        self, matrix: str, decoder: Decoder, codes: NDArray[np.uint8], first: int, out: Array
    ) -> Array | None:
        """What `encode` makes of the values of these codes, without making the values.  None: it has to have
        them."""
        return None


def problem(key: str, value: object, what: str) -> str:
    """`quantization_config: fmt = 'e5m2': only e4m3 is supported`."""
    return f"quantization_config: {key} = {shown(value)}: {what}"


def shown(value: object) -> str:
    return reprlib.repr(value)[:80]
