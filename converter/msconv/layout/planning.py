"""Making a plan.  Pure: from a weight table, sizes and headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from msconv_runtime.dtypes import DTYPES
from msconv_runtime.errors import PlanError

from ..quant import MadeFormat
from ..quant.record import LeftOut
from .checks import common_dtype, coverage, divisions, dropped_sources, mixtures, other_layout, unfit
from .constants import RANK_CONSTANTS, Constant, constants_for
from .cuts import Mesh, part_shape
from .files import PART_BYTES, place
from .model import Output, Sizes, Table, TensorInfo, expand, present
from .plan import Move, Plan
from .stored import Formats, Tensor, encoded_as, formats_of, left_out, tensors_of

DAMAGED = (
    "The files are whole: downloading them again gives the same.  Check that config.json belongs to these "
    "weights, and that this model is one that msconv converts."
)


@dataclass(frozen=True)
class Examined:
    """A checkpoint's headers held against a weight table: the same for any number of ranks.  `damage`: what is
    missing, unknown or misshapen; `mixed`: matrices stored as one and not alike; `unfit`: codes where none can be;
    `types`: element types that cannot be; `others`: several of values.  `beside`: what is left out of those that
    `dropped` has, by the matrix it belongs to.  `source_dtype`: of most values."""

    outputs: list[Output]
    formats: Formats
    beside: Mapping[str, list[LeftOut]]
    dropped: list[LeftOut]
    source_dtype: str
    damage: list[str]
    mixed: list[str]
    unfit: list[str]
    types: list[str]
    others: list[str]

    @property
    def problems(self) -> list[str]:
        return [*self.damage, *self.mixed, *self.unfit, *self.types, *self.others]

    def hint(self, sizes: Sizes, mesh: Mesh, quant: MadeFormat | None) -> str:
        """What to do next."""
        if self.damage:
            return DAMAGED
        if self.mixed:
            return "Quantise them alike, or leave all of them out."
        if self.unfit:
            return "Leave --quant out: they stay as they are." if quant else "Quantise the model without them."
        if self.types:
            return "Save these tensors in one of the types that are named, or quantise the model again."
        return other_layout(self.outputs, sizes, mesh)


def examine(
    table: Table,
    sizes: Sizes,
    sources: Mapping[str, TensorInfo],
    dtype: str | None = None,
    quant: MadeFormat | None = None,
) -> Examined:
    """Every problem that a plan would have over any ranks, none raised."""
    outputs = present(expand(table, sizes), sources)
    formats = formats_of(outputs, sizes, sources)
    used = {name for o in outputs for _, name in o.sources}
    used |= {c for name, chosen in formats.items() for c in chosen.companions(name)}
    beside = {name: entries for o in outputs for name, entries in left_out(o, sources, formats).items()}
    dropped = [
        *(d for entries in beside.values() for d in entries),
        *dropped_sources(table, sizes, sources, used),
    ]
    damage = coverage(outputs, sizes, sources, formats, dropped)
    types, others = list[str](), list[str]()
    source_dtype = common_dtype(outputs, sources, formats, dtype, types, others)
    mixed, codes = mixtures(outputs, formats), unfit(outputs, formats, quant)
    return Examined(outputs, formats, beside, dropped, source_dtype, damage, mixed, codes, types, others)


def make_plan(
    table: Table,
    sizes: Sizes,
    sources: Mapping[str, TensorInfo],
    mesh: Mesh,
    dtype: str | None = None,
    part_bytes: int = PART_BYTES,
    quant: MadeFormat | None = None,
) -> Plan:
    """Plan a conversion.  Raises PlanError that lists every missing, unused, misshapen or indivisible tensor.
    `dtype` None keeps the sources' own; matrices that are decoded take that of the others.  `quant`: what matrices
    of values are brought into."""
    return lay_out(examine(table, sizes, sources, dtype, quant), sizes, sources, mesh, dtype, part_bytes, quant)


def lay_out(
    found: Examined,
    sizes: Sizes,
    sources: Mapping[str, TensorInfo],
    mesh: Mesh,
    dtype: str | None = None,
    part_bytes: int = PART_BYTES,
    quant: MadeFormat | None = None,
) -> Plan:
    """The plan over these ranks of what was examined, with the same arguments."""
    outputs, formats = found.outputs, found.formats
    if problems := [*found.problems, *divisions(outputs, sizes, mesh)]:
        raise PlanError("\n".join(problems), found.hint(sizes, mesh, quant))

    draft = _Draft(sizes, mesh, dtype or found.source_dtype)
    encoded: dict[str, MadeFormat] = {}
    for output in outputs:
        if chosen := encoded_as(output, formats, quant):
            encoded |= {name: chosen for _, name in output.sources}
        for tensor in tensors_of(output, sizes, sources, formats, quant):
            if tensor.width:
                draft.add_stacked(tensor)
            else:
                draft.add(tensor)
    draft.add_constants()
    placed, files = place(draft.tensors, part_bytes)
    return Plan(
        mesh=mesh,
        sizes=sizes,
        dtype=draft.dtype,
        source_dtype=next((f.element for f in formats.values() if not f.is_kept), found.source_dtype),
        tensors=placed,
        files=files,
        moves={name: tuple(moves) for name, moves in draft.moves.items()},
        units=tuple((*unit, *(draft.sums[n] for n in unit if n in draft.sums)) for unit in draft.units),
        formats=formats,
        sources=sources,
        constants=tuple(draft.constants),
        dropped=tuple(found.dropped),
        vocab=draft.vocab,
        encoded=encoded,
        checked={
            name: kept
            for name, entries in found.beside.items()
            if name in draft.moves and (kept := tuple(e for e in entries if e.twin or e.is_zero))
        },
    )


@dataclass
class _Draft:
    """Tensors (name, element type, shape, bytes of parts) one after the other, and what moves into them.  `sums`:
    {matrix: the source of sums over its columns}, which is moved with it."""

    sizes: Sizes
    mesh: Mesh
    dtype: str
    tensors: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    moves: dict[str, list[Move]] = field(default_factory=dict)
    units: dict[tuple[str, ...], None] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    vocab: tuple[int, int] = (0, 0)

    def add(self, tensor: Tensor) -> None:
        """Pieces joined along rows."""
        dtype, shapes = tensor.dtype or self.dtype, self._shapes(tensor)
        for i, piece in enumerate(tensor.pieces):
            move = Move(len(self.tensors), i, piece.cut, item=piece.item, sums_of=piece.sums_of)
            self.moves.setdefault(piece.source, []).append(move)
            if piece.sums_of:
                self.sums[piece.sums_of] = piece.source
            else:
                self.units[(piece.source,)] = None
            if piece.cut.pad:
                self.vocab = (piece.shape[0], shapes[i][0] * self.mesh.tp)
        joined = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
        item = DTYPES[dtype].nbytes
        self.tensors.append((tensor.name, dtype, joined, tuple(math.prod(s) * item for s in shapes)))

    def add_stacked(self, tensor: Tensor) -> None:
        """The pieces of each of a rank's experts, transposed, side by side."""
        dtype, shapes, width = tensor.dtype or self.dtype, self._shapes(tensor), tensor.width
        local = self.sizes.experts // self.mesh.ep
        for i, piece in enumerate(tensor.pieces):
            owner, slot = divmod(i // width, local)
            column = sum(s[0] for s in shapes[i // width * width : i])
            move = Move(len(self.tensors), slot, piece.cut, owner, column, piece.item)
            self.moves.setdefault(piece.source, []).append(move)
        names = [piece.source for piece in tensor.pieces]
        self.units |= dict.fromkeys(tuple(names[i : i + width]) for i in range(0, len(names), width))
        shape = (*reversed(shapes[0][1:]), sum(s[0] for s in shapes[:width]))
        nbytes = math.prod(shape) * DTYPES[dtype].nbytes
        self.tensors.append((tensor.name, dtype, (local, *shape), (nbytes,) * local))

    def add_constants(self) -> None:
        for kind, shape in constants_for(self.mesh).items():
            self.constants.append(Constant(len(self.tensors), kind))
            dtype = RANK_CONSTANTS[kind]
            self.tensors.append((kind, dtype, shape, (math.prod(shape) * DTYPES[dtype].nbytes,)))

    def _shapes(self, tensor: Tensor) -> list[tuple[int, ...]]:
        """Shapes of one rank's part of each piece."""
        return [part_shape(p.cut, p.shape, self.mesh, self.sizes.dims) for p in tensor.pieces]
