"""The record of a weight format: how a matrix is stored in a checkpoint and in an artifact, and what is done with it.

A format is one file in this directory that makes a WeightFormat.  Nothing here knows a model, a rank or a disk, and
nothing imports a framework before a method that needs it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Along = Literal["matrix", "rows", "columns", "whole"]


@dataclass(frozen=True, slots=True)
class Stored:
    """One of the tensors that a matrix is stored as.

    `name`: with `{matrix}` for the matrix's own name (`...q_proj.weight`) or `{module}` for what comes before its
    last dot.  `shape`: from the matrix's (rows, columns).  `dtype`: its element type, "" for the one that the
    artifact's values have.  `along`: what its entries belong to, and so how it is cut: `matrix`, as the matrix itself;
    `rows`, one entry (or row of entries) for each row of the matrix, in the same order; `columns`, one for each of
    its columns; `whole`, the same on every rank.
    """

    name: str
    shape: Callable[[int, int], tuple[int, ...]]
    dtype: str = ""
    along: Along = "matrix"

    def of(self, matrix: str) -> str:
        """Its name beside the matrix of that name."""
        return self.name.format(matrix=matrix, module=matrix.rpartition(".")[0])

    def local_shape(self, matrix: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape for a matrix [out, inner], or for experts' matrices [E, inner, out]: those are transposed, and so
        is what belongs to them."""
        if len(matrix) == 2:
            return self.shape(*matrix)
        experts, inner, out = matrix
        return (experts, *reversed(self.shape(out, inner)))


MATRIX = Stored("{matrix}", lambda rows, columns: (rows, columns))


class Kept:
    """How a matrix is kept in an artifact, and how a graph multiplies by it.  This one: as its values."""

    stored: tuple[Stored, ...] = (MATRIX,)

    def tensors(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], str]]:
        """(parameter name, shape, element type) of each tensor that a graph reads, for a matrix [out, inner] or
        experts' matrices [E, inner, out], sizes of one rank.  Element type "": the one that the target stores
        matrices in."""
        return [(t.of(name), t.local_shape(shape), t.dtype) for t in self.stored]

    def multiply(self, ops: Any) -> Any:
        """What a graph calls as (x [T, inner], *tensors of a matrix [out, inner]) -> [T, out].  Called once for each
        matrix, while the graph is built; `ops` are the operations of a target."""
        return ops.product()

    def values(self, ops: Any) -> Any | None:
        """What a graph calls as (*tensors) -> the matrix or matrices in `ops.dtype`, for products of another form than
        `multiply`'s (experts, latent attention).  None: the first tensor holds the values themselves."""
        return None


AS_VALUES = Kept()
