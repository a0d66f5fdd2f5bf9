"""A candidate that runs layer by layer, judged as it goes, and its state in between, kept for another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from msconv_runtime.roles import HIDDEN, LOGITS

from ..mindir.interpreter import Execution
from .comparison import Comparison
from .kept import Kept
from .reference import Trace
from .scenario import Call, Seen
from .together import Piece


@runtime_checkable
class InLayers(Protocol):
    """A candidate that can run all calls of a scenario together."""

    apart: float

    @property
    def has_all_tokens(self) -> bool: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def has_layers_apart(self) -> bool: ...
    def executions(self, calls: list[Call]) -> tuple[list[Execution], list[list[str]]]: ...
    def together(
        self, executions: list[Execution], names: list[list[str]], begin: int = 0
    ) -> Iterator[tuple[int, list[Piece]]]: ...


class JudgeInLayers(Protocol):
    """How what all calls gave is added to a comparison."""

    def __call__(
        self,
        result: Comparison,
        one: InLayers,
        calls: list[Call],
        traces: list[Trace],
        kept: Kept,
        name: str,
        tell: Callable[[int, int], None],
    ) -> None: ...


def judge_in_layers(
    result: Comparison,
    one: InLayers,
    calls: list[Call],
    traces: list[Trace],
    kept: Kept,
    name: str,
    tell: Callable[[int, int], None],
) -> None:
    """Add to `result` what all calls gave.  `name`: of what is kept of this candidate."""
    total = one.num_layers + 1
    found = kept.load(name)
    begin = 0 if found is None else int(found[1]["layer"])
    executions, names = ([], []) if begin == total else one.executions(calls)
    if found is not None:
        _resume(result, one, executions, *found)
    tell(begin, total)
    if begin == total:
        return
    for done, pieces in one.together(executions, names, begin):
        for piece in pieces:
            add_piece(result, calls[piece.call], piece, traces)
        tell(done, total)
        if 0 < done < total and kept.is_due:
            kept.save(name, *_state(result, one, executions, done))
    kept.save(name, *_state(result, one, [], total))


def add_piece(result: Comparison, call: Call, piece: Piece, traces: list[Trace]) -> None:
    """Compare what one layer of a call gave."""
    result.add_norms(call.phase, call.places, piece.probes, traces)
    if piece.is_last:
        logits = piece.outputs.get(LOGITS, np.zeros((0, 0), np.float32))
        result.add_step(Seen(call.phase, call.places, call.rows, logits, {}, piece.outputs.get(HIDDEN)), traces)


def _state(
    result: Comparison, one: InLayers, executions: list[Execution], layer: int
) -> tuple[dict[str, torch.Tensor], Any]:
    """Values that later layers need, but for the inputs, which are made again.  A rank's that is rank 0's is kept
    once."""
    tensors: dict[str, torch.Tensor] = {}
    runs = []
    for number, execution in enumerate(executions):
        ranks: list[dict[str, Any]] = []
        for rank, env in enumerate(execution.values):
            said = {}
            for name, value in env.items():
                if name in execution.program.inputs:
                    continue
                if rank and _same(value, execution.values[0].get(name)):
                    said[name] = {"rank": 0}
                else:
                    said[name] = _say(value, f"{number}/{rank}/{name}", tensors)
            ranks.append(said)
        inputs = [n for n in execution.program.inputs if n in execution.values[0]]
        runs.append({"at": execution.at, "apart": execution.apart, "ranks": ranks, "inputs": inputs})
    return tensors, {"layer": layer, "result": asdict(result), "apart": one.apart, "runs": runs}


def _resume(
    result: Comparison,
    one: InLayers,
    executions: list[Execution],
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, Any],
) -> None:
    """What `_state` gave."""
    for name, value in numbers["result"].items():
        setattr(result, name, value)
    one.apart = numbers["apart"]
    for execution, run in zip(executions, numbers["runs"], strict=True):
        execution.at, execution.apart = run["at"], run["apart"]
        for rank, said in enumerate(run["ranks"]):
            given = {name: v for name, v in execution.values[rank].items() if name in run["inputs"]}
            made = {
                name: execution.values[0][name] if value == {"rank": 0} else _heard(value, tensors)
                for name, value in said.items()
            }
            execution.values[rank] = {**given, **made}


def _same(value: Any, other: Any) -> bool:
    """Whether both are tensors of the same bits."""
    if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return value.dtype == other.dtype and torch.equal(value, other)


def _say(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, tuple | list):
        return {"tuple": [_say(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _heard(said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in said:
        return tensors[said["tensor"]]
    if "tuple" in said:
        return tuple(_heard(v, tensors) for v in said["tuple"])
    return said["value"]
