"""What is run to prove a draft of EAGLE3, and how it is judged.

The target is not needed: its embedding and its hidden states are drawn, and both sides get the same.  That the
target's own graphs give the streams that its draft expects, is proved with the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.artifact import Artifact
from msconv_runtime.paging import Batch
from msconv_runtime.roles import Role

TOKENS = 2048  # of the target's, at most so many are drawn: the rows of all others stay untouched
Run = Callable[[Role, Batch, NDArray[np.float32]], dict[str, NDArray[np.float32]]]


class Target:
    """The model that a draft is made for, as far as it reads it: a table of random rows."""

    def __init__(self, artifact: Artifact, vocab: int, hidden: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.artifact, self.tensors = artifact, dict[str, Any]()
        self.tokens = np.sort(rng.choice(vocab, min(vocab, TOKENS), replace=False))
        self.table = np.zeros((vocab, hidden), np.float32)
        self.table[self.tokens] = rng.normal(0, 1, (len(self.tokens), hidden))

    def rows(self, rank: int, tp: int) -> NDArray[np.float32]:
        """A rank's part of the table, filled up with zeros where it does not divide."""
        count = -(-len(self.table) // tp)
        part = self.table[rank * count : (rank + 1) * count]
        return np.concatenate([part, np.zeros((count - len(part), part.shape[1]), np.float32)])
