"""The shape of every value of a graph for one batch: free dimensions of an outline, filled in from its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msconv_runtime.errors import ArtifactError

from .outline import PREFIX, Given, Outline, Step

Shape = tuple[int, ...]
PASSED_ON = ("Load", "Depend", "UpdateState")  # the value is the first input's
ALL_ROWS = {"AllGather": "rank_size"}  # kinds that multiply the rows, and the attribute that says by what


@dataclass(frozen=True)
class Batch:
    """What a graph is called with: `sequences` of `new` tokens each, with `context` places of each in the cache,
    the new ones counted.  `page`: slots of a page of the cache."""

    sequences: int
    new: int
    context: int
    page: int = 128

    @property
    def tokens(self) -> int:
        return self.sequences * self.new

    @property
    def seen(self) -> int:
        """Keys that the new tokens look at, all together: each those before it and itself."""
        return self.sequences * (self.new * self.context - self.new * (self.new - 1) // 2)


def input_shapes(outline: Outline, batch: Batch, mask: Shape) -> dict[str, Shape]:
    """The inputs' shapes: those of msconv_runtime.paging.Batch, a mask, hidden states, and the caches."""
    pages = -(-batch.context // batch.page)
    rows, of_each = (batch.tokens,), (batch.sequences,)
    known: list[Shape] = [rows, rows, rows, (batch.sequences, pages), of_each, of_each, mask]
    found = {}
    for i, (name, given) in enumerate(outline.inputs):
        if i < len(known) and len(given.shape) == len(known[i]):
            found[name] = known[i]
        elif len(given.shape) == 2:  # hidden states
            found[name] = (batch.tokens, given.shape[1])
        else:
            found[name] = (batch.sequences * pages, batch.page, *given.shape[2:])
    return found


def shapes(outline: Outline, batch: Batch, mask: Shape = (1, 1)) -> dict[str, tuple[Shape, ...]]:
    """By value: its shape, or those of a tuple's items.  Raises ArtifactError for a node whose result stays
    open."""
    found: dict[str, tuple[Shape, ...]] = {n: (g.shape,) for n, g in outline.parameters.items()}
    found |= {n: (s,) for n, s in input_shapes(outline, batch, mask).items()}
    constants = {s.output: s.value for s in outline.steps if s.kind == "Constant"}
    for step in outline.steps:
        if step.kind == "Constant":
            found[step.output] = tuple(g.shape for g in step.gives)
            continue
        given = [found.get(name, ()) for name in step.inputs]
        numbers = [constants.get(name) for name in step.inputs]
        found[step.output] = result = _result(step, given, numbers)
        if any(n < 0 for shape in result for n in shape):
            raise ArtifactError(f"{step.output} ({step.kind}): its shape {result} stays open.", "Report this.")
    return found


def _result(
    step: Step, given: Sequence[tuple[Shape, ...]], numbers: Sequence[int | Shape | None]
) -> tuple[Shape, ...]:
    kind, declared = step.kind, tuple(g.shape for g in step.gives)
    if kind == "MakeTuple":
        return tuple(shape for of_item in given for shape in of_item[:1])
    if kind == "TupleGetItem" and isinstance(numbers[1], int):
        return given[0][numbers[1] : numbers[1] + 1] or declared
    if kind in PASSED_ON:
        return given[0]
    if all(n >= 0 for shape in declared for n in shape):
        return declared
    first = given[0][0]
    if kind in SPECIAL:
        return SPECIAL[kind](first, given, declared)
    if kind == "Transpose" and isinstance(numbers[1], tuple):
        return (tuple(first[n] for n in numbers[1]),)
    if kind in ALL_ROWS:
        return ((first[0] * step.attributes[ALL_ROWS[kind]], *first[1:]),)
    return tuple(_filled(shape, [item for of_input in given for item in of_input]) for shape in declared)


def _filled(shape: Shape, given: Sequence[Shape]) -> Shape:
    """Free dimensions: the largest of inputs with as many dimensions, or the rows of the first input."""
    alike = [g for g in given if len(g) == len(shape)]
    rows = given[0][0] if given and given[0] else -1
    return tuple(
        n if n >= 0 else max((g[i] for g in alike), default=rows if i == 0 else -1) for i, n in enumerate(shape)
    )


def _reshaped(first: Shape, given: Sequence[tuple[Shape, ...]], declared: tuple[Shape, ...]) -> tuple[Shape, ...]:
    rest = math.prod(n for n in declared[0] if n >= 0)
    return (tuple(n if n >= 0 else math.prod(first) // rest for n in declared[0]),)


def _gathered(first: Shape, given: Sequence[tuple[Shape, ...]], declared: tuple[Shape, ...]) -> tuple[Shape, ...]:
    return ((*given[1][0], *first[1:]),)


def _multiplied(
    first: Shape, given: Sequence[tuple[Shape, ...]], declared: tuple[Shape, ...]
) -> tuple[Shape, ...]:
    """[b, m, k] by [b, ..] -> [b, m, n]; rows of a flat product."""
    return ((*first[:-1], declared[0][-1]),)


def _sorted(first: Shape, given: Sequence[tuple[Shape, ...]], declared: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Rows by expert: one for each choice of each token."""
    rows = math.prod(given[1][0])
    return ((rows, first[1]), (rows,), *declared[2:])


def _unsorted(first: Shape, given: Sequence[tuple[Shape, ...]], declared: tuple[Shape, ...]) -> tuple[Shape, ...]:
    return ((given[2][0][0], first[1]),)


def _attended(first: Shape, given: Sequence[tuple[Shape, ...]], declared: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """A row for each of the query's, whatever else is given."""
    return tuple(_filled(shape, [first]) for shape in declared)


SPECIAL = {
    "FlashAttentionScore": _attended,
    "PagedAttention": _attended,
    "Reshape": _reshaped,
    "Gather": _gathered,
    "MatMul": _multiplied,
    "BatchMatMul": _multiplied,
    "QuantBatchMatmul": _multiplied,
    "MoeInitRoutingV2": _sorted,
    "InnerMoeTokenUnpermute": _unsorted,
}


def weights_of(outline: Outline, through: Sequence[str]) -> Mapping[str, str]:
    """By value: the weight that it is, whichever `through` kinds of nodes it came."""
    found = {name: name.removeprefix(PREFIX) for name in outline.parameters}
    for step in outline.steps:
        if step.kind in through and step.inputs and step.inputs[0] in found:
            found[step.output] = found[step.inputs[0]]
    return found


def item_bytes(outline: Outline) -> dict[str, tuple[int, ...]]:
    """By value: bytes of an element, or of each item's."""
    named: list[tuple[str, tuple[Given, ...]]] = [
        (n, (g,)) for n, g in (*outline.parameters.items(), *outline.inputs)
    ]
    named += [(s.output, s.gives) for s in outline.steps]
    return {name: tuple(g.item_bytes for g in gives) for name, gives in named}
