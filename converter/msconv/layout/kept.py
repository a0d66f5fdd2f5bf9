"""Which tensors of an artifact are kept in which weight format, by group: for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..quant import PLAIN, WeightFormat, kept_format
from .constants import RANK_CONSTANTS
from .names import fold


@dataclass(frozen=True, slots=True)
class KeptGroup:
    """Tensors of one format and element type.  `format`: its name, "" for values.  `names`: of matrices and
    other values, folded over layers; `tensors`: how many they are; `nbytes`: of one rank, with scales and the
    like."""

    format: str
    title: str
    dtype: str
    names: tuple[str, ...]
    tensors: int
    nbytes: int


@dataclass
class _Gathered:
    title: str
    names: list[str] = field(default_factory=list)
    nbytes: int = 0


def kept_groups(tensors: Iterable[tuple[str, str, int]], formats: Sequence[WeightFormat]) -> list[KeptGroup]:
    """`tensors`: (name, element type, bytes of one rank).  Codes first, then values."""
    found = {name: (dtype, nbytes) for name, dtype, nbytes in tensors if name not in RANK_CONSTANTS}
    owners: dict[str, str] = {}  # what stands beside codes, and whose it is
    chosen: dict[str, WeightFormat] = {}
    for name, (dtype, _) in found.items():
        weight_format = kept_format(name, found, formats)
        if weight_format is not PLAIN and dtype == weight_format.stored[0].dtype:
            chosen[name] = weight_format
            owners |= {stored.of(name): name for stored in weight_format.stored[1:]}
    groups: dict[tuple[str, str], _Gathered] = {}
    for name, (_, nbytes) in found.items():
        matrix = owners.get(name, name)
        kept = chosen.get(matrix, PLAIN)
        key = (kept.name, found[matrix][0])
        group = groups.setdefault(key, _Gathered(kept.title if kept is not PLAIN else "values"))
        group.nbytes += nbytes
        if matrix == name:
            group.names.append(name)
    return [
        KeptGroup(name, g.title, dtype, tuple(n for n, _ in fold(g.names)), len(g.names), g.nbytes)
        for (name, dtype), g in sorted(groups.items(), key=lambda item: (not item[0][0], item[0]))
    ]
