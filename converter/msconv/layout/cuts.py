"""Cuts: how one source tensor is divided over ranks, and put together again.

A cut is a value.  Seen as a matrix (a vector is one column), the source is divided along rows or columns,
or copied.  `boxes` says which rectangles go to a rank, and `row_order` how rows change places within a head;
both, read backwards, join the ranks again, so every cut is reversible by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks of one model replica.  `ep` divides `tp`: experts are divided over `ep` groups, and the matrices of
    an expert over the `moe_tp` ranks of its group (SGLang's order: neighbours share experts)."""

    tp: int
    ep: int = 1

    @property
    def ranks(self) -> range:
        return range(self.tp)

    @property
    def moe_tp(self) -> int:
        return self.tp // self.ep

    def ep_rank(self, rank: int) -> int:
        return rank // self.moe_tp


def make_mesh(tp: int, ep: int) -> Mesh:
    """Raises UsageError if `ep` does not divide `tp`."""
    if tp < 1 or ep < 1 or tp % ep:
        works = [str(n) for n in range(1, tp + 1) if tp % n == 0]
        choices = works[0] if len(works) == 1 else f"{', '.join(works[:-1])} or {works[-1]}"
        raise UsageError(
            f"--tp {tp} --ep {ep}: ep must divide tp, and both be at least 1.",
            f"With --tp {tp} give --ep {choices}." if tp >= 1 else "",
        )
    return Mesh(tp, ep)


@dataclass(frozen=True, slots=True)
class Cut:
    """`axis` None copies to every rank; 0 divides rows; 1 divides columns.

    `unit` names the count that must stay whole (heads): it is divided, and rows or columns follow.
    `replicate`: more ranks than units share one unit.  `pad`: zero rows fill up the last ranks.
    `over`: all ranks, or the ranks that share an expert.
    `head` names the rows of one head.  Of each head, `rows` are taken from `first` on (both names, "" for all);
    the last `pairs` rows of each, stored as x0 y0 x1 y1 ..., become x0 x1 ... y0 y1 ...
    """

    name: str
    axis: int | None = None
    unit: str = ""
    replicate: bool = False
    pad: bool = False
    over: Literal["tp", "moe_tp"] = "tp"
    head: str = ""
    first: str = ""
    rows: str = ""
    pairs: str = ""


COPY = Cut("copy")
ROWS = Cut("rows", 0)  # [O, I] -> [O/tp, I]
COLS = Cut("cols", 1)  # [O, I] -> [O, I/tp]
HEADS = Cut("heads", 0, unit="heads")  # [heads*D, I] -> [heads/tp*D, I]
KV_HEADS = Cut("kv_heads", 0, unit="kv_heads", replicate=True)
HEAD_COLS = Cut("head_cols", 1, unit="heads")  # [O, heads*D] -> [O, heads/tp*D]
VOCAB = Cut("vocab", 0, pad=True)  # [V, I] -> [ceil(V/tp), I]
EXPERT_ROWS = Cut("expert_rows", 0, over="moe_tp")  # [O, I] -> [O*ep/tp, I]
EXPERT_COLS = Cut("expert_cols", 1, over="moe_tp")


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the source.  A rank's part is its boxes, one below the other."""

    row: int
    rows: int
    col: int
    cols: int


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as rows and columns.  [O, I, ...] -> (O, I*...), [N] -> (N, 1), [] -> (1, 1)."""
    cols = 1
    for n in shape[1:]:
        cols *= n
    return (shape[0] if shape else 1, cols)


def problem(cut: Cut, shape: tuple[int, ...], mesh: Mesh, dims: Mapping[str, int]) -> str:
    """Why `shape` cannot be cut this way over `mesh`, or "" if it can."""
    ways = _ways(cut, mesh)
    if cut.axis is None or cut.pad or ways == 1:
        return ""
    size = matrix(shape)[cut.axis]
    units = dims[cut.unit] if cut.unit else size
    kind = cut.unit.replace("_", " ") if cut.unit else ("rows" if cut.axis == 0 else "columns")
    if units % ways == 0 or (cut.replicate and ways % units == 0):
        return ""
    over = f"tp={mesh.tp}" if cut.over == "tp" else f"the {ways} ranks of an expert (tp={mesh.tp} ep={mesh.ep})"
    return f"{units} {kind} do not split over {over}"


def part_shape(cut: Cut, shape: tuple[int, ...], mesh: Mesh, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of one rank's part: the same on every rank."""
    out = list(shape)
    if cut.axis is not None:
        out[cut.axis] = _extent(cut, shape[cut.axis], mesh, dims)
    if cut.rows:
        out[0] = out[0] // dims[cut.head] * dims[cut.rows]
    return tuple(out)


def boxes(cut: Cut, shape: tuple[int, ...], mesh: Mesh, dims: Mapping[str, int], rank: int) -> tuple[Box, ...]:
    """The rectangles of the source that make this rank's part, top to bottom.  Empty: all padding."""
    rows, cols = matrix(shape)
    if cut.axis is None:
        return (Box(0, rows, 0, cols),)
    extent = _extent(cut, shape[cut.axis], mesh, dims)
    ways = _ways(cut, mesh)
    if cut.replicate and dims[cut.unit] < ways:
        start = rank // (ways // dims[cut.unit]) * extent
    else:
        start = rank % ways * extent
    if cut.axis == 1:
        return (Box(0, rows, start, extent),)
    if cut.rows:
        head, first = dims[cut.head], dims[cut.first] if cut.first else 0
        return tuple(Box(row + first, dims[cut.rows], 0, cols) for row in range(start, start + extent, head))
    real = min(extent, max(0, rows - start))
    return (Box(start, real, 0, cols),) if real else ()


def row_order(cut: Cut, dims: Mapping[str, int]) -> NDArray[np.intp] | None:
    """Which row of a head goes to each place, [head] indices; None if all stay where they are."""
    if not cut.pairs or not dims[cut.pairs]:
        return None
    head, pairs = dims[cut.head], dims[cut.pairs]
    order = np.arange(head, dtype=np.intp)
    order[head - pairs :] = np.concatenate([order[head - pairs :: 2], order[head - pairs + 1 :: 2]])
    return order


def _ways(cut: Cut, mesh: Mesh) -> int:
    return mesh.tp if cut.over == "tp" else mesh.moe_tp


def _extent(cut: Cut, size: int, mesh: Mesh, dims: Mapping[str, int]) -> int:
    ways = _ways(cut, mesh)
    if cut.pad:
        return -(-size // ways)
    return size // (min(ways, dims[cut.unit]) if cut.replicate else ways)
