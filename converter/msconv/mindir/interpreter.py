"""The interpreter: a parsed graph executed node by node, for one rank or for several together.

Knows no file and no server: weights and collectives come from whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from msconv_runtime.errors import VerificationFailed
from msconv_runtime.vector_math import choose_code

from .codes import Listener
from .kernels import KERNELS, Context
from .program import Node, Program

COLLECTIVES = {"AllReduce": {"group", "op", "index", "fusion", "no_eliminate"}}
COLLECTIVES["AllGather"] = {"group", "rank_size", "index", "fusion", "no_eliminate"}
NORMS = ("RmsNorm", "AddRmsNorm", "Mul", ":Norm", ":AddNorm")
LAYERS = (":Layer", ":LayerInt8")
WEIGHTS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
BIASES = ("input_layernorm.bias", "post_attention_layernorm.bias")


class Weights(Protocol):
    """One rank's weights, in the type that the interpreter computes in."""

    def get(self, name: str, declared: torch.dtype | None) -> torch.Tensor: ...


Collective = Callable[
    [Node, list[torch.Tensor]], list[torch.Tensor]
]  # each rank's part in, each rank's result out


@dataclass
class Step:
    """What a run gave.  `outputs[rank]`: the graph's, in order; none if it was stopped.  `probes[name]`: the
    output of that norm, rank 0, [T, hidden].  `apart`: how far ranks differ where they must be the same."""

    outputs: list[list[NDArray[np.float32]]]
    probes: dict[str, NDArray[np.float32]]
    apart: float


class Interpreter:
    """Executes programs for the ranks whose `weights` it was given."""

    def __init__(self, context: Context, weights: Sequence[Weights], collective: Collective) -> None:
        self.context, self.weights, self._collective = context, weights, collective
        choose_code()

    def run(self, program: Program, inputs: list[list[torch.Tensor]], stop: str = "") -> Step:
        """Execute for all ranks; not further than the norm whose weight is `stop`.  Raises VerificationFailed
        naming the node that cannot be run."""
        execution = Execution(self, program, inputs, stop)
        probes = execution.advance(len(program.nodes))
        return Step(execution.outputs(), probes, execution.apart)

    def node(self, node: Node, program: Program, values: list[dict[str, Any]], listener: Listener) -> list[Any]:
        if node.kind == "Constant":
            value = node.value
            if isinstance(value, torch.Tensor):
                value = value.to(self.context.keep(value.dtype))
            return [value] * len(values)

        def arguments(rank: int) -> list[Any]:
            env = values[rank]
            return [env[n] if n in env else self._weight(rank, program, n) for n in node.inputs]

        if node.kind in COLLECTIVES:
            check_collective(node)
            return list(self._collective(node, [arguments(rank)[0] for rank in range(len(values))]))
        kernel = KERNELS.get(node.kind)
        if kernel is None:
            raise VerificationFailed(f"{node.where}: the primitive {node.kind} is not known: it cannot be proved.")
        if unknown := set(node.attributes) - kernel.attributes:
            raise VerificationFailed(f"{node.where}: attributes {sorted(unknown)} are not known.")
        results = []
        try:
            for rank in range(len(values)):  # of large weights only one rank's are in memory
                given = arguments(rank)
                results.append(kernel.run(self.context, node.attributes, *given))
                listener.kernel(rank, node, kernel, given)
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as e:
            raise VerificationFailed(f"{node.where} cannot be run: {type(e).__name__}: {e}") from None
        return results

    def _weight(self, rank: int, program: Program, name: str) -> torch.Tensor:
        if name not in program.parameters:
            raise VerificationFailed(f"the graph reads {name}, which nothing made.")
        weight = program.parameters[name]
        return self.weights[rank].get(weight, program.declared[weight][0])


class Execution:
    """One run of a program for all ranks, which can pause between two nodes.  `at`: the node that comes next.
    `values[rank]`: what later nodes still need, by name."""

    def __init__(
        self, interpreter: Interpreter, program: Program, inputs: list[list[torch.Tensor]], stop: str = ""
    ) -> None:
        if len(program.inputs) != len(inputs[0]):
            raise VerificationFailed(
                f"the graph takes {len(program.inputs)} inputs, its manifest describes {len(inputs[0])}."
            )
        bias = stop.removesuffix(".weight") + ".bias"
        self.stop = bias if bias in program.declared else stop
        self.interpreter, self.program = interpreter, program
        self.values: list[dict[str, Any]] = [dict(zip(program.inputs, given, strict=True)) for given in inputs]
        self.at, self.apart, self.is_stopped = 0, 0.0, False
        self._listener = Listener(program, interpreter.context.codes)

    def begin_at(self, at: int, before: Sequence[int], given: dict[str, Any]) -> None:
        """Begin at this node, with values `given`, the same for every rank, and what the nodes `before` make."""
        for env in self.values:
            env.update(given)
        for i in before:
            node = self.program.nodes[i]
            results = self.interpreter.node(node, self.program, self.values, self._listener)
            for env, result in zip(self.values, results, strict=True):
                env[node.output] = result
        self.at = at

    def advance(self, end: int) -> dict[str, NDArray[np.float32]]:
        """Execute the nodes before `end`.  The output of each norm that came by, rank 0, [T, hidden]."""
        probes: dict[str, NDArray[np.float32]] = {}
        while self.at < end and not self.is_stopped:
            node = self.program.nodes[self.at]
            results = self.interpreter.node(node, self.program, self.values, self._listener)
            for env, result in zip(self.values, results, strict=True):
                env[node.output] = result
            self._listener.after(self.at, self.values)
            if weight := probed_norm(node):
                normed = [_first(r).float() for r in results]
                probes[weight.rpartition(".")[0]] = normed[0].numpy()
                self.apart = max(self.apart, _apart(normed))
                self.is_stopped = weight == self.stop
            self._forget(node)
            self.at += 1
        return probes

    def _forget(self, node: Node) -> None:
        """Drop what no later node reads."""
        for name in node.inputs:
            if self._listener.last_use[name] == self.at and name != self.program.output:
                for env in self.values:
                    env.pop(name, None)

    def outputs(self) -> list[list[NDArray[np.float32]]]:
        """Of each rank, in order, when all nodes were executed; none if it was stopped."""
        if self.is_stopped:
            return []
        found = [_all(env[self.program.output]) for env in self.values]
        for of_ranks in zip(*found, strict=True):
            self.apart = max(self.apart, _apart(list(of_ranks)))
        return [[value.numpy() for value in of_rank] for of_rank in found]


def check_collective(node: Node) -> None:
    """Raises VerificationFailed for a collective with attributes that are not known, or that is no sum."""
    if unknown := set(node.attributes) - COLLECTIVES[node.kind]:
        raise VerificationFailed(f"{node.where}: attributes {sorted(unknown)} are not known.")
    if node.kind == "AllReduce" and node.attributes.get("op") != "sum":
        raise VerificationFailed(f"{node.where}: reduces by {node.attributes.get('op')!r}, not by sum.")


def join(node: Node, parts: list[torch.Tensor]) -> torch.Tensor:
    """What a collective gives every rank, from all ranks' parts in their order.  Sums are made in float32."""
    if node.kind == "AllGather":
        if node.attributes.get("rank_size") != len(parts):
            raise VerificationFailed(
                f"{node.where}: gathers {node.attributes.get('rank_size')} ranks of {len(parts)}."
            )
        return torch.cat(parts, 0)
    return torch.stack([p.float() for p in parts]).sum(0).to(parts[0].dtype)


def _apart(values: list[torch.Tensor]) -> float:
    """Largest difference to the first; what is not a number differs without bound."""
    worst = max(float((v - values[0]).abs().max()) if v.numel() else 0.0 for v in values)
    return worst if worst == worst else float("inf")


def probed_norm(node: Node) -> str:
    """The weight, or the bias, of the norm of the whole residual stream that this node's first result is, or "".
    There is one after each attention and each MLP; where a layer is one node, the one after it."""
    if node.kind == "Add":
        return node.parameter if node.parameter.endswith(BIASES) else ""
    name = node.last_parameter if node.kind.endswith(LAYERS) else node.parameter
    return name if node.kind.endswith((*NORMS, *LAYERS)) and name.endswith(WEIGHTS) else ""


def _all(value: Any) -> list[torch.Tensor]:
    """The outputs, in float32."""
    return [v.float() for v in (value if isinstance(value, tuple) else (value,))]


def _first(value: Any) -> torch.Tensor:
    first: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return first
