"""Codes of activations: which values of a graph they are, which matrix they are multiplied by, and their record.

A proof of int8 products leads its reference by these.  A graph of MindSpore's own operations or of Ascend's has
them as values; a compiled kernel makes its own, and its entry in the table of kernels makes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .kernels import Kernel, Recorder
from .program import Node, Program

OF_WEIGHTS = {
    "Load",
    "Depend",
    "Cast",
    "StridedSlice",
    "Gather",
    "Reshape",
    "Transpose",
    "MakeTuple",
    "TupleGetItem",
}
MAKE_CODES = {"QuantV2", "Round"}
CLAMP = {"Minimum", "Maximum"}  # of codes: codes again
KEEP_CODES = {"StridedSlice", "Reshape", "Transpose", "MakeTuple", "Cast"}
MULTIPLY = {"MatMul", "BatchMatMul", "QuantBatchMatmul", "GroupedMatmulV4"}
SORT, SCATTER, GATHER = "MoeInitRoutingV2", "ScatterNd", "Gather"  # how rows come to their experts
IDS = {SORT: 1, SCATTER: 0, GATHER: 1}  # which input says each row's expert
TOWARDS_IDS = {"Reshape": 0, "Add": 0, "Mul": 0, "Muls": 0, "Select": 1, "Sub": 0}  # what graphs make of ids


@dataclass(frozen=True)
class Record:
    """Codes of one matrix's input: int8 [T, K].  Of experts: [T, k, K], with the experts that each token was sent
    to, `ids` [T, k], whatever the rank; where another rank has the expert, codes mean nothing."""

    codes: torch.Tensor
    ids: torch.Tensor | None = None


@dataclass
class Codes:
    """What a run saw: for each call of a graph, records by (rank, name of the matrix)."""

    calls: list[dict[tuple[int, str], Record]] = field(default_factory=list)

    def begin(self) -> None:
        self.calls.append({})

    def saw(self, rank: int, matrix: str, codes: torch.Tensor, ids: torch.Tensor | None) -> None:
        self.calls[-1][rank, matrix] = Record(codes.to(torch.int8).clone(), ids)


@dataclass(frozen=True)
class Use:
    """A product of codes: `codes`, the value's name.  For experts `routing`: the node that brought rows to them,
    and `ids`, the value that says which."""

    matrix: str
    codes: str
    routing: Node | None = None
    ids: str = ""

    @property
    def needs(self) -> list[str]:
        """Values that must be there."""
        if self.routing is None:
            return [self.codes]
        return [self.codes, self.ids, self.routing.output, self.routing.inputs[0]]

    def record(self, env: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes as `Record` has them, and ids."""
        codes = env[self.codes]
        if self.routing is None:
            return codes, None
        ids = env[self.ids]
        rows = codes.reshape(-1, codes.shape[-1])
        if self.routing.kind == SORT:
            rows = rows[env[self.routing.output][1].long()]
        elif self.routing.kind == SCATTER:
            rows = rows[env[self.routing.inputs[0]].reshape(-1).long()]
        return rows.reshape(*ids.shape, -1), ids


class Listener:
    """Tells `recorder` of the codes in one run of a program; nothing if that is None.  `last_use`: the
    program's, or later where codes must still be found."""

    def __init__(self, program: Program, recorder: Recorder | None) -> None:
        self.recorder, self.last_use = recorder, program.last_use
        self.uses: dict[int, Use] = {}
        self.weights: dict[str, str] = {}
        if recorder is not None:
            recorder.begin()
            finder = _Finder(program)
            self.uses, self.weights = finder.uses(), finder.weights
            later = {name: i for i, use in self.uses.items() for name in use.needs}
            self.last_use = program.last_use | {n: max(i, program.last_use.get(n, i)) for n, i in later.items()}

    def after(self, step: int, ranks: Sequence[dict[str, Any]]) -> None:
        """A step was run; `ranks`: values by name, which the last product that needs them drops."""
        use = self.uses.get(step)
        if use is None or self.recorder is None:
            return
        for rank, env in enumerate(ranks):
            self.recorder.saw(rank, use.matrix, *use.record(env))
            for name in use.needs:
                if self.last_use[name] == step:
                    env.pop(name, None)

    def kernel(self, rank: int, node: Node, kernel: Kernel, inputs: list[Any]) -> None:
        """A kernel is run with these inputs."""
        if self.recorder is None or kernel.codes is None:
            return
        for place, codes, ids in kernel.codes(*inputs):
            self.recorder.saw(rank, self.weights[node.inputs[place]], codes, ids)


class _Finder:
    """Where a program multiplies codes.  Each matrix once, whatever number of pieces it is multiplied in."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made = {n.output: n for n in program.nodes}
        self.weights = {
            value: name for value, name in program.parameters.items() if program.declared[name][0] == torch.int8
        }
        self.chosen: dict[str, Node] = {}  # experts' matrices that were gathered -> by which node
        self.codes: dict[str, str] = {}  # value -> the codes that it is, or is a part of
        self.routing: dict[str, int] = {}  # value -> the last step before it that brought rows to experts

    def uses(self) -> dict[int, Use]:
        at: dict[int, Use] = {}
        seen = set()
        for i, node in enumerate(self.program.nodes):
            self._follow(i, node)
            if node.kind in MULTIPLY and (use := self._use(node)) is not None and use.matrix not in seen:
                seen.add(use.matrix)
                at[i] = use
        return at

    def _follow(self, i: int, node: Node) -> None:
        first = node.inputs[0] if node.inputs else ""
        if node.kind in OF_WEIGHTS and first in self.weights:
            self.weights[node.output] = self.weights[first]
            if node.kind == GATHER:
                self.chosen[node.output] = node
            elif first in self.chosen:
                self.chosen[node.output] = self.chosen[first]
        if node.kind in MAKE_CODES or (node.kind in CLAMP and first in self.codes) or self._is_row_codes(node):
            self.codes[node.output] = node.output
        elif node.kind in KEEP_CODES and first in self.codes:
            self.codes[node.output] = self.codes[first]
        before = max((self.routing[name] for name in node.inputs if name in self.routing), default=-1)
        if node.kind in (SORT, SCATTER):
            before = i
        if before >= 0:
            self.routing[node.output] = before

    def _is_row_codes(self, node: Node) -> bool:
        if node.kind != "TupleGetItem" or node.inputs[0] not in self.made:
            return False
        return self.made[node.inputs[0]].kind == "DynamicQuantExt" and self.made[node.inputs[1]].value == 0

    def _use(self, node: Node) -> Use | None:
        pairs = (node.inputs[:2], node.inputs[1::-1])
        found = next(((x, w) for x, w in pairs if x in self.codes and w in self.weights), None)
        if found is None:
            return None
        codes, weight = found
        matrix = self.weights[weight]
        if len(self.program.declared[matrix][1]) == 2:
            return Use(matrix, self.codes[codes])
        routing = self.chosen.get(weight)
        if routing is None:
            routing = self.program.nodes[self.routing[codes]]
        ids = routing.inputs[IDS[routing.kind]]
        while ids in self.made and self.made[ids].kind in TOWARDS_IDS:
            ids = self.made[ids].inputs[TOWARDS_IDS[self.made[ids].kind]]
        return Use(matrix, self.codes[codes], routing, ids)
