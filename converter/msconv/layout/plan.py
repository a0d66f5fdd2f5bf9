"""The plan: every output file, header, offset and byte range, decided before a byte moves.

All ranks share one layout (same names, shapes, offsets); what differs is which box of a source a rank gets.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..quant.record import LeftOut, MadeFormat, Stored
from . import constants
from .constants import Constant
from .cuts import Box, Cut, Mesh, boxes, row_order
from .files import OutFile, OutTensor
from .model import Sizes, TensorInfo
from .stored import Formats


@dataclass(frozen=True, slots=True)
class Move:
    """A source tensor goes, cut, to part `part` of output tensor `tensor`.

    `owner`: the group of expert-parallel ranks that has this expert; -1, every rank.  `column`: where its columns
    begin in the part, transposed, of a stacked tensor; -1, it is not transposed.  `item`: of a source that is
    encoded, which of the tensors that are made of it.  `sums_of`: each rank gets its own columns' share, of sums
    over the columns of that matrix.
    """

    tensor: int
    part: int
    cut: Cut
    owner: int = -1
    column: int = -1
    item: int = 0
    sums_of: str = ""

    @property
    def is_transposed(self) -> bool:
        return self.column >= 0


@dataclass(frozen=True)
class Plan:
    """`units`: source tensors that are moved together, each in one.  `formats`: of matrices that are not plain, by
    name.  `encoded`: into what values are brought, by name.  `dropped`: sources that are not read.  `vocab`: (real
    rows, padded rows of all ranks)."""

    mesh: Mesh
    sizes: Sizes
    dtype: str
    source_dtype: str
    tensors: tuple[OutTensor, ...]
    files: tuple[OutFile, ...]
    moves: Mapping[str, tuple[Move, ...]]
    units: tuple[tuple[str, ...], ...]
    formats: Formats
    sources: Mapping[str, TensorInfo]
    constants: tuple[Constant, ...]
    dropped: tuple[LeftOut, ...]
    vocab: tuple[int, int] = field(default=(0, 0))
    encoded: Mapping[str, MadeFormat] = field(default_factory=dict)
    checked: Mapping[str, tuple[LeftOut, ...]] = field(default_factory=dict)

    @property
    def rank_bytes(self) -> int:
        return sum(f.size for f in self.files)

    @property
    def output_bytes(self) -> int:
        return self.rank_bytes * self.mesh.tp

    @property
    def read_names(self) -> list[str]:
        """Every source tensor that is read: those that are moved, what others are decoded with, and what is only
        looked at."""
        return [*self.moves, *(c for name in self.moves for c in self.read_with(name))]

    @property
    def read_bytes(self) -> int:
        return sum(self.sources[name].nbytes for name in self.read_names)

    @property
    def parameters(self) -> int:
        """Elements of the source tensors that are used, without scales and the like, and without a draft's: the
        model's published parameter count."""
        companions = {c for name, chosen in self.formats.items() for c in chosen.companions(name)}
        of_model = [n for n in self.moves if n not in companions and not self.sizes.is_of_draft(n)]
        return sum(math.prod(self.sources[name].shape) for name in of_model)

    @property
    def draft_bytes(self) -> int:
        """Bytes of the layer that guesses further tokens, on one rank."""
        return sum(t.nbytes for t in self.tensors if self.sizes.is_of_draft(t.name))

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts among one rank's weights: the same on every rank."""
        stacked = {m.tensor for moves in self.moves.values() for m in moves if m.is_transposed}
        return sum(self.tensors[i].nbytes for i in stacked)

    @property
    def quant(self) -> str:
        """The weight formats in which matrices are kept, by name; "" if all are values."""
        kept = {f.kept_as.name for f in self.formats.values() if f.is_kept}
        return ", ".join(sorted(kept | {f.name for f in self.encoded.values()}))

    def is_decoded(self, name: str) -> bool:
        """Whether a source is codes that become values while they are moved."""
        return name in self.formats and not self.formats[name].is_kept

    def decoded_with(self, name: str) -> tuple[str, ...]:
        """Other sources that are read to decode this one."""
        return self.formats[name].companions(name) if self.is_decoded(name) else ()

    def held_against(self, name: str) -> tuple[str, ...]:
        """Other sources that codes which stay as they are, are held against: their scales."""
        if name not in self.formats or self.is_decoded(name):
            return ()
        return tuple(s.of(name) for s in self.formats[name].sources[1:] if s.holds == "scales")

    @cached_property
    def beside_codes(self) -> Mapping[str, Stored]:
        """Scales and the like that are moved for themselves, by name."""
        kept = ((name, chosen) for name, chosen in self.formats.items() if chosen.is_kept)
        return {s.of(name): s for name, chosen in kept for s in chosen.sources[1:] if s.holds}

    def read_with(self, name: str) -> tuple[str, ...]:
        """Other sources that are read when this one is moved."""
        return (*self.decoded_with(name), *(entry.name for entry in self.checked.get(name, ())))

    def ranks(self, move: Move) -> list[int]:
        """Ranks that get this move's bytes."""
        return [r for r in self.mesh.ranks if move.owner in (-1, self.mesh.ep_rank(r))]

    def reads(self, unit: tuple[str, ...]) -> tuple[str, ...]:
        """Its sources, and what is read with them."""
        return (*unit, *(c for name in unit for c in self.read_with(name)))

    def shared(self, unit: tuple[str, ...]) -> tuple[str, ...]:
        """Small sources that other units move and that this one needs too: what something is compared with,
        the scales of codes, and the offset that sums are taken with."""
        twins = [entry.twin for name in unit for entry in self.checked.get(name, ()) if entry.twin]
        twins += [scales for name in unit for scales in self.held_against(name)]
        if any(move.sums_of for name in unit for move in self.moves[name]):
            stored = self.formats[unit[0]].stored
            twins += [s.of(unit[0]) for s in stored if s.along == "input"]
        return tuple(twins)

    def unit_bytes(self, unit: tuple[str, ...]) -> int:
        """What is read for it."""
        return sum(self.sources[n].nbytes for n in self.reads(unit))

    def is_done(self, unit: tuple[str, ...], done: Container[str]) -> bool:
        """Whether all of a unit's sources are among those that were moved."""
        return all(n in done for n in self.reads(unit))

    def boxes(self, name: str, move: Move, rank: int) -> tuple[Box, ...]:
        return boxes(move.cut, self.shape(name, move), self.mesh, self.sizes.dims, rank)

    def shape(self, name: str, move: Move) -> tuple[int, ...]:
        """Of what is cut: the source, or what is made of it."""
        shape = self.sources[name].shape
        return self.encoded[name].stored[move.item].shape(*shape) if move.item else shape

    def row_order(self, move: Move) -> NDArray[np.intp] | None:
        """How rows change places within a head, or None."""
        return row_order(move.cut, self.sizes.dims)

    def part_offset(self, move: Move) -> int:
        """Where the part begins in its file, in bytes."""
        tensor = self.tensors[move.tensor]
        return len(self.files[tensor.file].header) + tensor.begin + sum(tensor.parts[: move.part])

    def part_matrix(self, move: Move) -> tuple[int, int]:
        """Rows and columns of one expert's part of a stacked tensor."""
        shape = self.tensors[move.tensor].shape
        return math.prod(shape[1:-1]), shape[-1]

    def constant_bytes(self, constant: Constant, rank: int) -> bytes:
        return constants.constant_bytes(self.mesh, constant.kind, rank, self.vocab[1], self.sizes.experts)
