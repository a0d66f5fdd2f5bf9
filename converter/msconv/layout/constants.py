"""Small tensors in which ranks differ: made here, not read from a checkpoint.  A target may need only some."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .cuts import Mesh

RANK_CONSTANTS = {"vocab_start": "int32", "rank_onehot": "float32", "expert_start": "int32"}


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor in which ranks differ, one of RANK_CONSTANTS."""

    tensor: int
    kind: str


def constants_for(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """{kind: shape} of those that this many ranks need."""
    out: dict[str, tuple[int, ...]] = {}
    if mesh.tp > 1:
        out = {"vocab_start": (1,), "rank_onehot": (mesh.tp, 1, 1)}
    if mesh.ep > 1:
        out["expert_start"] = (1,)
    return out


def constant_bytes(mesh: Mesh, kind: str, rank: int, vocab: int, experts: int) -> bytes:
    """`vocab_start`, `expert_start`: first of the `vocab` rows and of the `experts` that the rank has, int32.
    `rank_onehot`: 1.0 at the rank, float32."""
    if kind == "vocab_start":
        return struct.pack("<i", rank * vocab // mesh.tp)
    if kind == "expert_start":
        return struct.pack("<i", mesh.ep_rank(rank) * experts // mesh.ep)
    return struct.pack(f"<{mesh.tp}f", *(float(r == rank) for r in mesh.ranks))
