"""Stored weights against those that graphs read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from msconv_runtime.artifact import D2T, OF_TARGET

from .constants import RANK_CONSTANTS

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def unused_names(stored: Iterable[str], read: Iterable[str]) -> list[str]:
    """Weights that no graph reads, leaving out the rank constants that other targets need, and what a server reads
    of a draft."""
    return sorted(set(stored) - set(read) - set(RANK_CONSTANTS) - {D2T})


def own_names(read: Iterable[str]) -> set[str]:
    """Of the weights that graphs read, those of their own artifact."""
    return {name for name in read if not name.startswith(OF_TARGET)}


def without_draft(names: Iterable[str], layers: int) -> Iterator[str]:
    """Names of weights but for those of layers after the last, which a draft reads."""
    for name in names:
        found = LAYER.match(name)
        if found is None or int(found[1]) < layers:
            yield name


def misfits(stored: Mapping[str, Sequence[int]], read: Iterable[tuple[str, Sequence[int]]]) -> list[str]:
    """One line for each weight that a target's graphs read and that is not stored, or in another shape; and for
    each that is stored and that none of them reads.  Both sides are (name, shape)."""
    wanted = {name: list(shape) for name, shape in read if not name.startswith(OF_TARGET)}
    problems = [f"{n}: needed by a graph, not among the weights" for n in wanted.keys() - stored.keys()]
    problems += [f"{n}: among the weights, not used by a graph" for n in unused_names(stored, wanted)]
    problems += [
        f"{n}: the graph wants {wanted[n]}, the weights have {list(stored[n])}"
        for n in wanted.keys() & stored.keys()
        if wanted[n] != list(stored[n])
    ]
    return sorted(problems)
