"""All calls of a scenario through a model layer by layer: each layer's weights are read once for all of them.

Tokens are drawn beforehand, so a call needs nothing of an earlier one but the caches of its layers.  Where each
cache is touched in one layer only, layer after layer gives what call after call gives; where a graph does
something else with caches, which may be the fault that is looked for, calls run one after another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..mindir.interpreter import Execution
from ..mindir.program import Program

LAYER = re.compile(r"model\.layers\.(\d+)\.")
SAME_VALUE = {"Load", "Depend", "Cast", "MakeTuple", "TupleGetItem", "ScatterUpdate"}  # may give what they take
PASS_ON = {"Load", "Depend", "MakeTuple", "TupleGetItem"}  # and do not look at it


@dataclass(frozen=True)
class Piece:
    """What one layer of a call gave: norms [T, hidden] by name; `outputs`, by name, after the last layer."""

    call: int
    probes: dict[str, NDArray[np.float32]]
    outputs: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    is_last: bool = False


def count_layers(programs: Iterable[Program]) -> int:
    """Of the layers whose weights are read."""
    found = (LAYER.match(node.parameter) for program in programs for node in program.nodes)
    return max((int(m[1]) + 1 for m in found if m), default=0)


def layer_ends(program: Program, layers: int) -> list[int]:
    """Where each layer's nodes end: behind the last that reads a weight of it or of an earlier one.  One more for
    what follows the last layer."""
    ends = [0] * layers
    for i, node in enumerate(program.nodes):
        if (found := LAYER.match(node.parameter)) and int(found[1]) < layers:
            ends[int(found[1])] = i + 1
    return [*np.maximum.accumulate(ends).tolist(), len(program.nodes)] if layers else [len(program.nodes)]


def keep_caches_apart(programs: Iterable[Program], layers: int, num_caches: int) -> bool:
    """Whether each cache is touched within one layer only, the same in all programs."""
    touched: dict[int, set[int]] = {}
    for program in programs:
        ends = layer_ends(program, layers)
        first = len(program.inputs) - num_caches
        shared = {name: frozenset([i]) for i, name in enumerate(program.inputs[first:])}
        for i, node in enumerate(program.nodes):
            layer = int(np.searchsorted(ends, i, side="right"))
            caches = frozenset[int]().union(*(shared.get(name, ()) for name in node.inputs))
            if caches and node.kind in SAME_VALUE:
                shared[node.output] = caches
            if node.kind not in PASS_ON:
                for cache in caches:
                    touched.setdefault(cache, set()).add(layer)
    return all(len(of_cache) == 1 for of_cache in touched.values())


def in_layers(
    executions: Sequence[Execution], names: Sequence[Sequence[str]], layers: int, begin: int = 0
) -> Iterator[tuple[int, list[Piece]]]:
    """Each layer with its pieces, all calls of it in their order; the last is what follows the layers.  `names`:
    of each call's outputs; `begin`: the first layer to run, of executions that are that far."""
    ends = [layer_ends(e.program, layers) for e in executions]
    for layer in range(begin, layers + 1):
        pieces = []
        for number, execution in enumerate(executions):
            probes = execution.advance(ends[number][layer])
            pieces.append(piece(number, execution, probes, names[number], layer == layers))
        yield layer, pieces


def piece(
    number: int,
    execution: Execution,
    probes: dict[str, NDArray[np.float32]],
    names: Sequence[str],
    is_last: bool,
) -> Piece:
    """A call's piece, with rank 0's outputs if it is the last."""
    found = execution.outputs() if is_last else []
    outputs = dict(zip(names, found[0], strict=False)) if found else {}
    return Piece(number, probes, outputs, is_last)
