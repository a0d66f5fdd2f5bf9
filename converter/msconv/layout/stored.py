"""What outputs are stored as: one tensor, or several where their matrices are kept in a weight format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..quant import PLAIN, WeightFormat, format_of, unconfigured
from ..quant.record import Stored
from .cuts import COPY, Cut
from .model import Output, Sizes, TensorInfo, is_matrix
from .rules import OWN


@dataclass(frozen=True, slots=True)
class Piece:
    """A source tensor, whole, and how it is cut."""

    source: str
    shape: tuple[int, ...]
    cut: Cut


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the artifact and what it is made of, in order.  `dtype` "": that of the artifact's values.
    `width`: of a stacked one, how many pieces lie side by side; 0 if it is not stacked."""

    name: str
    dtype: str
    pieces: tuple[Piece, ...]
    width: int = 0


Formats = Mapping[str, WeightFormat]


def formats_of(outputs: list[Output], sizes: Sizes, sources: Mapping[str, TensorInfo]) -> Formats:
    """{source: its format}, of those that are not plain; also of what is no matrix or has no configuration, which
    is for the checks to refuse."""
    found: dict[str, WeightFormat] = {}
    for name in (name for output in outputs for _, name in output.sources if name in sources):
        chosen = format_of(name, sources, sizes.formats) or unconfigured(sources[name].dtype)
        if chosen is not None and chosen is not PLAIN:
            found[name] = chosen
    return found


def kept_as(output: Output, formats: Formats) -> WeightFormat:
    """The format in which its matrices are kept: that of the first, which is that of all of them."""
    part, name = output.sources[0]
    chosen = formats.get(name, PLAIN)
    return chosen if chosen.is_kept and is_matrix(output.rule, part) else PLAIN


def tensors_of(output: Output, sizes: Sizes, sources: Mapping[str, TensorInfo], formats: Formats) -> list[Tensor]:
    """What it is stored as.  Of outputs that passed the checks."""
    rule = output.rule
    kept = kept_as(output, formats)
    width = len(rule.parts) if rule.stacked else 0
    if kept is PLAIN:
        dtype = sources[output.sources[0][1]].dtype if rule.dtype == OWN else rule.dtype
        pieces = tuple(Piece(name, sizes.shape(part), part.cut) for part, name in output.sources)
        return [Tensor(output.name, dtype, pieces, width)]
    return [
        Tensor(
            stored.of(output.name),
            stored.dtype,
            tuple(
                Piece(stored.of(name), stored.shape(*sizes.shape(part)), cut_of(stored, part.cut))
                for part, name in output.sources
            ),
            width,
        )
        for stored in kept.stored
    ]


def cut_of(stored: Stored, matrix: Cut) -> Cut:
    """How a tensor is cut that belongs to a matrix with this cut."""
    if stored.along == "matrix":
        return matrix
    return matrix if stored.along == "rows" and matrix.axis != 1 else COPY
