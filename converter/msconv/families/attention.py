"""What one layer's attention computes, as a value: operations build it, or say that they cannot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Attention:
    """`kind`: `heads` with keys and values of their own in the cache, or `latent` (Mla has its widths).

    `head_dim`: of queries and keys.  `scale`: of scores.  `window`: how many positions a token sees, its own
    counted; None for all before it.  `qk_norm`: queries and keys are normed per head.  `bias`: on queries, keys
    and values; `output_bias`: on what leaves.
    """

    kind: Literal["heads", "latent"]
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    qk_norm: bool = True
    bias: bool = False
    output_bias: bool = False

    def on_rank(self, tp: int) -> Attention:
        """One rank's share of the heads: keys and values of which there are fewer than ranks are repeated."""
        return replace(self, heads=self.heads // tp, kv_heads=max(1, self.kv_heads // tp))
