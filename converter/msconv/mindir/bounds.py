"""The least time that a graph's work can take on a device, from figures that others published.  Bounds, never
measurements: nothing of it ran anywhere.

Three parts, each the work over the device's best rate: memory (weights and cache; activations may stay in a cache
on the chip), products, and bytes between ranks.  Whatever overlaps, no run is faster than the largest; a device
that runs node after node is no faster than their sum, node by node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msconv_runtime.targets import Figures

from .work import Total, Work

MEMORY, COMPUTE, LINK = "memory", "compute", "link"


@dataclass(frozen=True)
class Bound:
    """Seconds of one call.  A part is None where a figure that it needs is unknown: `unknown` names those.
    `seconds`: the largest part that is known, None if none is.  `one_after_another`: the sum over nodes, None if
    any part is unknown."""

    memory: float | None
    compute: float | None
    link: float | None
    one_after_another: float | None

    @property
    def parts(self) -> dict[str, float | None]:
        return {MEMORY: self.memory, COMPUTE: self.compute, LINK: self.link}

    @property
    def unknown(self) -> list[str]:
        return [name for name, seconds in self.parts.items() if seconds is None]

    @property
    def seconds(self) -> float | None:
        return max((s for s in self.parts.values() if s is not None), default=None)

    @property
    def by(self) -> str:
        """The part that bounds, "" if none is known."""
        known = {name: s for name, s in self.parts.items() if s is not None}
        return max(known, key=lambda name: known[name], default="")


def bound(whole: Total, done: Sequence[tuple[Work, int]], figures: Figures, tp: int) -> Bound:
    """Of `whole`, the total of the nodes `done`, each with how often it is there.  `tp`: ranks, a device each."""
    memory = over(whole.weight_bytes + whole.kv_bytes, figures.memory_bytes_per_s)
    half = over(whole.half_operations, figures.half_ops_per_s)
    int8 = over(whole.int8_operations, figures.int8_ops_per_s)
    compute = None if half is None or int8 is None else half + int8
    link = link_seconds(whole.collectives, figures, tp)
    chain = None
    if memory is not None and compute is not None and link is not None:
        chain = link + sum(_node(w, figures) * times for w, times in done)
    return Bound(memory, compute, link, chain)


def _node(work: Work, figures: Figures) -> float:
    rate = figures.int8_ops_per_s if work.type == "int8" else figures.half_ops_per_s
    parts = over(work.weight_bytes + work.kv_bytes, figures.memory_bytes_per_s), over(work.operations, rate)
    return max(s for s in parts if s is not None)


def over(work: float, rate: float | None) -> float | None:
    """Seconds; None if there is work and no figure."""
    if not work:
        return 0.0
    return None if rate is None else work / rate


def link_seconds(collectives: Mapping[tuple[str, int], int], figures: Figures, tp: int) -> float | None:
    """All collectives, one after another.  No way to sum S bytes over n ranks sends less than 2 * (n-1)/n * S from
    each, none to gather G bytes less than (n-1)/n * G to each.  Where ranks are on several machines those
    exchange as much, over all their devices' outer links at once."""
    machines = -(-tp // figures.per_machine)
    inside = tp // machines
    seconds = 0.0
    for (kind, size), times in collectives.items():
        factor = 2 if kind == "AllReduce" else 1
        inner = over(factor * size * (inside - 1) / inside, figures.link_bytes_per_s)
        outer = over(factor * size / inside * (machines - 1) / machines, figures.outer_bytes_per_s)
        if inner is None or outer is None:
            return None
        seconds += max(inner, outer) * times
    return seconds


def moved_bytes(collectives: Mapping[tuple[str, int], int], tp: int) -> float:
    """Bytes that one rank must send in all collectives of a call."""
    share = (tp - 1) / tp
    return sum((2 if k == "AllReduce" else 1) * size * share * n for (k, size), n in collectives.items())
