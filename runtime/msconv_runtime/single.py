"""Decoding of one request, bound once more with shapes that do not change.

Between the nodes of a graph with dynamic shapes MindSpore works out each node's shapes, and looks up its kernel
again: 2.8 of 37 ms a token at Qwen3-0.6B's shape.  One token of one sequence has the same shapes at every step,
but for its table, which is as wide as `WIDTH` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .paging import Batch

WIDTH = 4096  # of a table, in pages; where a sequence has more, attention takes longer than what is saved


class SingleRequest:
    """A cell of the graph that decodes, compiled for one token and these very caches."""

    def __init__(self, cell: Any, caches: Sequence[Any]) -> None:
        self.cell, self._caches = cell, list(caches)
        one = np.ones(1, np.int32)
        nothing = Batch(
            input_ids=one,
            positions=one,
            slots=one,
            block_tables=np.zeros((1, 1), np.int32),
            context_lens=one,
            q_lens=one,
        )
        self.arguments = [*self._tensors(nothing), *self._caches]

    def is_for(self, caches: Sequence[Any]) -> bool:
        return are_the_same(caches, self._caches)

    def takes(self, batch: Batch, caches: Sequence[Any]) -> bool:
        """Whether this is one token of one sequence, short enough, with the caches it was compiled for."""
        return len(batch.input_ids) == 1 and batch.block_tables.shape[1] <= WIDTH and self.is_for(caches)

    def inputs(self, batch: Batch) -> list[Any]:
        """What the cell takes for a batch of which `takes` is true."""
        return [*self._tensors(batch), *self._caches]

    def _tensors(self, batch: Batch) -> list[Any]:
        from mindspore import Tensor

        return [Tensor.from_numpy(a if a.ndim == 1 else _widened(a)) for a in batch.arrays]


def are_the_same(caches: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether these are the very same tensors."""
    return len(caches) == len(others) and all(a is b for a, b in zip(caches, others, strict=True))


def _widened(table: NDArray[np.int32]) -> NDArray[np.int32]:
    wide = np.zeros((1, WIDTH), np.int32)
    wide[:, : table.shape[1]] = table
    return wide
