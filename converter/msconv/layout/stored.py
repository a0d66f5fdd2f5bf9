"""What outputs are stored as: one tensor, or several where their matrices are kept in a weight format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..quant import PLAIN, MadeFormat, WeightFormat, format_of, unconfigured
from ..quant.record import LeftOut, Stored
from .cuts import COPY, Cut
from .model import Output, Sizes, TensorInfo, is_matrix
from .rules import OWN


@dataclass(frozen=True, slots=True)
class Piece:
    """A source tensor, whole, and how it is cut.  `item`: of a source that is encoded, which of the tensors that
    are made of it.  `sums_of`: the matrix over whose columns its entries are sums, where ranks divide those."""

    source: str
    shape: tuple[int, ...]
    cut: Cut
    item: int = 0
    sums_of: str = ""


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
    return chosen.kept_as if chosen.is_kept and is_matrix(output.rule, part) else PLAIN


def encoded_as(output: Output, formats: Formats, quant: MadeFormat | None) -> MadeFormat | None:
    """The format that its matrices are brought into: what is asked, if they are values and may be quantised."""
    can_be = is_matrix(output.rule, output.sources[0][0]) and not output.rule.as_values
    return quant if can_be and kept_as(output, formats) is PLAIN else None


def tensors_of(
    output: Output,
    sizes: Sizes,
    sources: Mapping[str, TensorInfo],
    formats: Formats,
    quant: MadeFormat | None = None,
) -> list[Tensor]:
    """What it is stored as.  Of outputs that passed the checks.  `quant`: what is made of values, where that is
    asked."""
    rule = output.rule
    encoded = encoded_as(output, formats, quant)
    kept = encoded or kept_as(output, formats)
    width = len(rule.parts) if rule.stacked else 0
    if kept is PLAIN:
        dtype = sources[output.sources[0][1]].dtype if rule.dtype == OWN else rule.dtype
        pieces = tuple(Piece(name, sizes.shape(part), part.cut) for part, name in output.sources)
        return [Tensor(output.name, dtype, pieces, width)]
    found = []
    for item, stored in enumerate(kept.stored):
        pieces = tuple(
            Piece(
                name if encoded else stored.of(name),
                stored.shape(*sizes.shape(part)),
                cut_of(stored, part.cut),
                item if encoded else 0,
                name if stored.along == "sums" and part.cut.axis == 1 else "",
            )
            for part, name in output.sources
        )
        found.append(
            Tensor(stored.of(output.name), stored.dtype, pieces[: 1 if stored.along == "input" else None], width)
        )
    return found


def left_out(output: Output, sources: Mapping[str, TensorInfo], formats: Formats) -> dict[str, list[LeftOut]]:
    """Tensors that nothing reads, by the matrix they belong to: those its format names, and, of matrices that are
    joined, what the others have of the input they share."""
    found = {
        name: [entry for entry in formats[name].left_out(name) if entry.name in sources]
        for _, name in output.sources
        if name in formats
    }
    kept, (_, first) = kept_as(output, formats), output.sources[0]
    shared = [s for s in kept.stored if s.along == "input"] if kept is not PLAIN else []
    for s in shared:
        for _, name in output.sources[1:]:
            reason = f"the same as that of {first}: they share their input"
            found.setdefault(name, []).append(LeftOut(s.of(name), reason, twin=s.of(first)))
    return found


def cut_of(stored: Stored, matrix: Cut) -> Cut:
    """How a tensor is cut that belongs to a matrix with this cut."""
    if stored.along == "matrix":
        return matrix
    return matrix if stored.along in ("rows", "sums") and matrix.axis != 1 else COPY
