"""What a graph's nodes must do for one batch: bytes of weights, cache and activations, multiplications, launches,
bytes between ranks.  Counted from the graph alone; no device, no time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .outline import Outline, Step
from .shapes import Batch, Shape, item_bytes, shapes, weights_of

# Nodes that start nothing on a device: views, constants, order, and numbers that the host keeps.
VIEWS = ("Constant", "Load", "Depend", "UpdateState", "MakeTuple", "TupleGetItem", "Reshape", "ExpandDims")
ON_THE_HOST = ("Shape", "TensorToTuple", "TensorToScalar", "ScalarMul", "ScalarSub")
THROUGH = ("Load", "Reshape", "MakeTuple", "Depend", "TupleGetItem")  # what a weight is still a weight behind
COLLECTIVES = ("AllReduce", "AllGather")
MLA_WIDTH = 15  # PagedAttention's input that says how wide a latent's values are
BEFORE, AFTER = -1, 1 << 30  # where a node stands that belongs to no layer

Type = Literal["half", "int8"]


@dataclass(frozen=True)
class Experts:
    """`count`: of a whole layer, all ranks together.  Tokens are taken to spread evenly over them."""

    count: int

    def reached(self, here: int, rows: int, tokens: int) -> float:
        """How many of `here` experts some row goes to, on average, where each token chooses `rows / tokens`."""
        share = rows / tokens / self.count
        return here * (1 - (1 - share) ** tokens)


@dataclass(frozen=True)
class Work:
    """Of one node.  Operations count a multiplication and an addition as two.  `moved_bytes`: what a collective
    reduces (`AllReduce`) or gives (`AllGather`), for one rank.  `layer`: the layer it belongs to, BEFORE or
    AFTER."""

    kind: str
    layer: int
    launches: int = 0
    weight_bytes: float = 0
    kv_bytes: int = 0
    activation_bytes: float = 0
    operations: float = 0
    type: Type = "half"
    moved_bytes: int = 0


@dataclass
class _Counter:
    outline: Outline
    batch: Batch
    experts: Experts | None
    shapes: dict[str, tuple[Shape, ...]]
    weights: dict[str, str] = field(default_factory=dict)
    items: dict[str, tuple[int, ...]] = field(default_factory=dict)
    numbers: dict[str, int | tuple[int, ...] | None] = field(default_factory=dict)

    def nbytes(self, name: str) -> int:
        """Of a value: all items of a tuple together."""
        return sum(math.prod(s) * b for s, b in zip(self.shapes[name], self.items[name], strict=False))

    def type_of(self, matrix: str) -> Type:
        return "int8" if self.items[matrix][0] == 1 else "half"

    def work(self, step: Step, layer: int) -> Work:
        if step.kind in VIEWS or step.kind in ON_THE_HOST:
            return Work(step.kind, layer)
        if step.kind in COLLECTIVES:
            moved = self.nbytes(step.output if step.kind == "AllGather" else step.inputs[0])
            return Work(step.kind, layer, 1, moved_bytes=moved)
        read = [n for n in dict.fromkeys(step.inputs) if self.shapes.get(n) and self.items.get(n)]
        activations = sum(self.nbytes(n) for n in read if n not in self.weights) + self.nbytes(step.output)
        weights: float = sum(self.nbytes(n) for n in read if n in self.weights)
        if step.kind in SPECIAL:
            return SPECIAL[step.kind](self, step, layer, weights, activations)
        return Work(step.kind, layer, 1, weights, 0, activations)

    def product(self, step: Step, layer: int, weights: float, activations: float) -> Work:
        inner = self.shapes[step.inputs[0]][0][-1]
        operations = 2.0 * inner * math.prod(self.shapes[step.output][0])
        return Work(step.kind, layer, 1, weights, 0, activations, operations, self.type_of(step.inputs[1]))

    def grouped(self, step: Step, layer: int, weights: float, activations: float) -> Work:
        rows, inner = self.shapes[step.inputs[0]][0]
        here, _, outer = self.shapes[step.inputs[1]][0]
        of_all = self.experts or Experts(here)
        reached = of_all.reached(here, rows, self.batch.tokens)
        operations = 2.0 * rows * here / of_all.count * inner * outer
        number = self.type_of(step.inputs[1])
        return Work(step.kind, layer, 1, weights * reached / here, 0, activations, operations, number)

    def gather(self, step: Step, layer: int, weights: float, activations: float) -> Work:
        """Only the rows that are looked up are read."""
        rows = self.nbytes(step.output)
        return Work(step.kind, layer, 1, rows if weights else 0, 0, rows if weights else 2 * rows)

    def write(self, step: Step, layer: int, weights: float, activations: float) -> Work:
        rows = sum(self.nbytes(n) for n in step.inputs[:2] if self.shapes.get(n))
        return Work(step.kind, layer, 1, 0, rows, rows)

    def paged(self, step: Step, layer: int, weights: float, activations: float) -> Work:
        """Reads the cache of every sequence once; of a latent keys and values are the same bytes."""
        query, keys, values = (self.shapes[n][0] for n in step.inputs[:3])
        width, item = keys[-1], self.items[step.inputs[1]][0]
        mla = self.numbers.get(step.inputs[MLA_WIDTH])
        of_values = mla if isinstance(mla, int) and mla else values[-1]
        read = keys[-2] * width + (0 if of_values == mla else values[-2] * values[-1])
        heads = query[-1] // width
        operations = 2.0 * heads * (width + of_values) * self.batch.seen
        moved = self.nbytes(step.inputs[0]) + self.nbytes(step.output)
        cache = self.batch.sequences * self.batch.context * read * item
        return Work(step.kind, layer, 1, 0, cache, moved, operations)

    def flash(self, step: Step, layer: int, weights: float, activations: float) -> Work:
        """New sequences: each token looks at those before it.  The padding of narrower values is computed too."""
        query = self.shapes[step.inputs[0]][0]
        operations = 2.0 * 2 * query[-1] * self.batch.seen
        moved = sum(self.nbytes(n) for n in step.inputs[:3]) + self.nbytes(step.inputs[0])
        return Work(step.kind, layer, 1, 0, 0, moved, operations)


SPECIAL: dict[str, Callable[[_Counter, Step, int, float, float], Work]] = {
    "MatMul": _Counter.product,
    "BatchMatMul": _Counter.product,
    "QuantBatchMatmul": _Counter.product,
    "GroupedMatmulV4": _Counter.grouped,
    "Gather": _Counter.gather,
    "ReshapeAndCache": _Counter.write,
    "PagedAttention": _Counter.paged,
    "FlashAttentionScore": _Counter.flash,
}


def works(outline: Outline, batch: Batch, experts: int, mask: Shape = (1, 1)) -> list[Work]:
    """What each node does, in the graph's order.  `experts`: of a whole layer, 0 where there are none.  Raises
    ArtifactError for a graph whose shapes cannot be found."""
    counter = _Counter(outline, batch, Experts(experts) if experts else None, shapes(outline, batch, mask))
    counter.weights = dict(weights_of(outline, THROUGH))
    counter.items = item_bytes(outline)
    counter.numbers = {s.output: s.value for s in outline.steps if s.kind == "Constant"}
    places = _layers(outline, counter.weights)
    return [counter.work(step, places[step.output]) for step in outline.steps]


def _layers(outline: Outline, weights: dict[str, str]) -> dict[str, int]:
    """By value: the layer that it belongs to: the last one of which it needs anything but its turn."""
    turns = {step.output for step in outline.steps if step.kind == "UpdateState"}
    found = {name: _layer_of(weight) for name, weight in weights.items() if name in outline.parameters}
    found |= {name: BEFORE for name, _ in outline.inputs}
    for step in outline.steps:
        found[step.output] = max((found[n] for n in step.inputs if n in found and n not in turns), default=BEFORE)
    return found


def _layer_of(weight: str) -> int:
    parts = weight.split(".")
    if parts[:2] == ["model", "layers"] and parts[2].isdecimal():
        return int(parts[2])
    return AFTER if weight.startswith(("lm_head", "model.norm")) else BEFORE


@dataclass(frozen=True)
class Total:
    """Work of a whole graph.  `half_operations`, `int8_operations`: by the type that is multiplied.
    `collectives`: (kind, bytes) and how often it comes.  `kinds`: launched nodes by their kind."""

    nodes: int = 0
    launches: int = 0
    weight_bytes: float = 0
    kv_bytes: int = 0
    activation_bytes: float = 0
    half_operations: float = 0
    int8_operations: float = 0
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)


def total(done: Sequence[tuple[Work, int]]) -> Total:
    """The sum of nodes, each so many times."""
    collectives: Counter[tuple[str, int]] = Counter()
    kinds: Counter[str] = Counter()
    for work, times in done:
        if work.moved_bytes:
            collectives[work.kind, work.moved_bytes] += times
        if work.launches:
            kinds[work.kind] += times

    def of(name: str, only: str = "") -> float:
        chosen = ((w, times) for w, times in done if not only or w.type == only)
        return sum(getattr(w, name) * times for w, times in chosen)

    return Total(
        nodes=sum(times for _, times in done),
        launches=int(of("launches")),
        weight_bytes=of("weight_bytes"),
        kv_bytes=int(of("kv_bytes")),
        activation_bytes=of("activation_bytes"),
        half_operations=of("operations", "half"),
        int8_operations=of("operations", "int8"),
        collectives=collectives,
        kinds=kinds,
    )
