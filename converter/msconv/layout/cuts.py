"""Cuts: how one source tensor is divided over ranks, and put together again.

A cut is a value.  Seen as a matrix (a vector is one column), the source is divided along rows or columns,
or copied.  `boxes` says which rectangle goes to a rank; the same boxes, read backwards, join the ranks
again, so every cut is reversible by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks of one model replica.  `ep` divides `tp` (SGLang's order: ep_rank = rank // (tp // ep))."""

    tp: int
    ep: int = 1

    @property
    def ranks(self) -> range:
        return range(self.tp)


@dataclass(frozen=True, slots=True)
class Cut:
    """`axis` None copies to every rank; 0 divides rows; 1 divides columns.

    `unit` names the count that must stay whole (heads): it is divided, and rows or columns follow.
    `replicate`: more ranks than units share one unit.  `pad`: zero rows fill up the last ranks.
    """

    name: str
    axis: int | None = None
    unit: str = ""
    replicate: bool = False
    pad: bool = False


COPY = Cut("copy")
ROWS = Cut("rows", 0)  # [O, I] -> [O/tp, I]
COLS = Cut("cols", 1)  # [O, I] -> [O, I/tp]
HEADS = Cut("heads", 0, unit="heads")  # [heads*D, I] -> [heads/tp*D, I]
KV_HEADS = Cut("kv_heads", 0, unit="kv_heads", replicate=True)
HEAD_COLS = Cut("head_cols", 1, unit="heads")  # [O, heads*D] -> [O, heads/tp*D]
VOCAB = Cut("vocab", 0, pad=True)  # [V, I] -> [ceil(V/tp), I]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the source and where its first row lands in the rank's part."""

    row: int
    rows: int
    col: int
    cols: int
    dst_row: int = 0


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as rows and columns.  [O, I, ...] -> (O, I*...), [N] -> (N, 1), [] -> (1, 1)."""
    cols = 1
    for n in shape[1:]:
        cols *= n
    return (shape[0] if shape else 1, cols)


def problem(cut: Cut, shape: tuple[int, ...], mesh: Mesh, dims: Mapping[str, int]) -> str:
    """Why `shape` cannot be cut this way over `mesh`, or "" if it can."""
    if cut.axis is None or cut.pad or mesh.tp == 1:
        return ""
    size = matrix(shape)[cut.axis]
    units = dims[cut.unit] if cut.unit else size
    kind = cut.unit.replace("_", " ") if cut.unit else ("rows" if cut.axis == 0 else "columns")
    if units % mesh.tp == 0 or (cut.replicate and mesh.tp % units == 0):
        return ""
    return f"{units} {kind} do not split over tp={mesh.tp}"


def part_shape(cut: Cut, shape: tuple[int, ...], mesh: Mesh, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of one rank's part: the same on every rank."""
    if cut.axis is None:
        return shape
    out = list(shape)
    out[cut.axis] = _extent(cut, shape[cut.axis], mesh, dims)
    return tuple(out)


def boxes(cut: Cut, shape: tuple[int, ...], mesh: Mesh, dims: Mapping[str, int], rank: int) -> tuple[Box, ...]:
    """The rectangles of the source that make this rank's part, top to bottom.  Empty: all padding."""
    rows, cols = matrix(shape)
    if cut.axis is None:
        return (Box(0, rows, 0, cols),)
    extent = _extent(cut, shape[cut.axis], mesh, dims)
    if cut.replicate and dims[cut.unit] < mesh.tp:
        start = rank // (mesh.tp // dims[cut.unit]) * extent
    else:
        start = rank * extent
    if cut.axis == 1:
        return (Box(0, rows, start, extent),)
    real = min(extent, max(0, rows - start))
    return (Box(start, real, 0, cols),) if real else ()


def _extent(cut: Cut, size: int, mesh: Mesh, dims: Mapping[str, int]) -> int:
    if cut.pad:
        return -(-size // mesh.tp)
    pieces = min(mesh.tp, dims[cut.unit]) if cut.replicate else mesh.tp
    return size // pieces
