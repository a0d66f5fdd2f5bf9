"""Where a graph can be cut between layers, so that each part can be run from values that are given to it.

A segment ends behind the norm with which the next layer begins.  What later segments read of it must be values
that the reference has too: that norm's output, or the residual stream beside it.  Which of the two a value is, is
said by a rule; if the rule were wrong the comparison at the segment's end would fail, because a value is compared
with exactly what is given to the segments that read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...mindir.interpreter import probed_norm
from ...mindir.program import Program
from ..together import PASS_ON, SAME_VALUE

NORM = re.compile(r"model\.layers\.(\d+)\.input_layernorm\.")


@dataclass(frozen=True)
class Carried:
    """A value that segments after `border` read: made before it, it depends on tokens.  `items`: of a tuple, those
    that are read; () if it is no tuple.  `is_norm`: the norm's output, alone or as item 0; all else is the
    residual stream."""

    name: str
    border: int
    is_norm: bool
    items: tuple[int, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Nodes `begin` to `end`.  `before`: nodes ahead of it that are run again for it, of positions and masks;
    `taken`: values that it is given; `left`: values that it makes and later ones take."""

    begin: int
    end: int
    before: tuple[int, ...]
    taken: tuple[Carried, ...]
    left: tuple[Carried, ...]


def segments_of(program: Program, layers: int, tokens: str, caches: Sequence[str]) -> list[Segment] | None:
    """One for each layer; the first has the embedding, the last the head.  None if the graph cannot be cut so.
    `tokens`, `caches`: names of those inputs."""
    cuts = _cuts(program, layers)
    if cuts is None:
        return None
    made = {node.output: i for i, node in enumerate(program.nodes)}
    tainted = _that_depend_on(program, {tokens, *caches})
    taken = []
    for begin, end in pairwise(cuts):
        outside = {n for node in program.nodes[begin:end] for n in node.inputs if made.get(n, begin) < begin}
        if end == cuts[-1] and made[program.output] < begin:
            return None
        taken.append(sorted(outside, key=made.__getitem__))
    carried = {}
    for name in {n for names in taken for n in names if n in tainted}:
        found = _carried(program, name, made[name], cuts)
        if found is None:
            return None
        carried[name] = found
    return [
        Segment(
            begin,
            end,
            _before(program, made, [n for n in names if n not in carried]),
            tuple(carried[n] for n in names if n in carried),
            tuple(c for c in sorted(carried.values(), key=lambda c: made[c.name]) if c.border == number + 1),
        )
        for number, ((begin, end), names) in enumerate(zip(pairwise(cuts), taken, strict=True))
    ]


def keep_caches_apart(program: Program, segments: Sequence[Segment], caches: Sequence[str]) -> list[int] | None:
    """The segment that touches each cache; None if one is touched by several, or by none."""
    shared = {name: frozenset([i]) for i, name in enumerate(caches)}
    touched: dict[int, set[int]] = {}
    for number, segment in enumerate(segments):
        for node in program.nodes[segment.begin : segment.end]:
            found = frozenset[int]().union(*(shared.get(name, ()) for name in node.inputs))
            if found and node.kind in SAME_VALUE:
                shared[node.output] = found
            if node.kind not in PASS_ON:
                for cache in found:
                    touched.setdefault(cache, set()).add(number)
    if sorted(touched) != list(range(len(caches))) or any(len(of_cache) != 1 for of_cache in touched.values()):
        return None
    return [touched[i].pop() for i in range(len(caches))]


def _cuts(program: Program, layers: int) -> list[int] | None:
    """Where segments begin, and the end of the last."""
    ends = dict[int, int]()
    for i, node in enumerate(program.nodes):
        if found := NORM.match(probed_norm(node)):
            ends[int(found[1])] = i + 1  # behind its bias, if it has one
    cuts = [0, *(ends.get(layer, -1) for layer in range(1, layers)), len(program.nodes)]
    return cuts if layers and cuts == sorted(set(cuts)) else None


def _that_depend_on(program: Program, names: set[str]) -> set[str]:
    """Values that are made of these inputs.  How long one of them is is known without it."""
    found = set(names)
    for node in program.nodes:
        is_length = node.kind == "Shape" and node.inputs[0] in names
        if not is_length and not found.isdisjoint(node.inputs):
            found.add(node.output)
    return found


def _before(program: Program, made: dict[str, int], names: Iterable[str]) -> tuple[int, ...]:
    """Nodes that make these values, in order."""
    found, todo = set[int](), [made[n] for n in names]
    while todo:
        if (i := todo.pop()) not in found:
            found.add(i)
            todo += [made[n] for n in program.nodes[i].inputs if n in made]
    return tuple(sorted(found))


def _carried(program: Program, name: str, at: int, cuts: Sequence[int]) -> Carried | None:
    """What a value is by the rule; None if a tuple is read otherwise than item by item."""
    border = next(number for number, cut in enumerate(cuts) if cut > at)
    last = program.nodes[cuts[border] - 1]
    is_norm = name == last.output
    constants = {n.output: n.value for n in program.nodes if n.kind == "Constant"}
    readers = [n for n in program.nodes if name in n.inputs]
    picks = [n for n in readers if n.kind == "TupleGetItem" and n.inputs[0] == name]
    items = {i for n in picks if isinstance(i := constants.get(n.inputs[1]), int)}
    if picks and (len(picks) < len(readers) or any(constants.get(n.inputs[1]) not in items for n in picks)):
        return None
    return Carried(name, border, is_norm, tuple(sorted(items)))
