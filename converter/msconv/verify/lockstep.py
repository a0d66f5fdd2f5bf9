"""All ranks of a shipped graph, executed together: node by node, with collectives as real sums and joins.

Reads the MindIR and the rank files and nothing else of ours: weights come through the safetensors library by
the names that the graph's parameters carry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from msconv_runtime.artifact import Artifact, Graph, GraphInput
from msconv_runtime.errors import VerificationFailed
from msconv_runtime.graphs import fitting
from msconv_runtime.mindir_check.allowed import TP_GROUP
from msconv_runtime.paging import Sequences, attention_mask
from msconv_runtime.roles import (
    DECODE,
    HIDDEN,
    LOGITS,
    PREFILL,
    ROLES,
    VERIFY,
    Role,
    graph_for,
    of_draft,
    of_model,
    of_variant,
)
from msconv_runtime.targets import target_named

from ..mindir.interpreter import Execution, Interpreter, join
from ..mindir.kernels import Context, Recorder
from ..mindir.program import Node, Program, parse
from .rank_files import Held, RankFiles, read_as_stored
from .scenario import Call
from .together import Piece, count_layers, in_layers, keep_caches_apart, piece

PAGE = 16
SMALL_BYTES = 64 << 20
KEEP_BYTES = 2 << 30  # weights of all ranks up to this stay in memory; above, a layer's do while it runs
HELD_BYTES = 4 << 30


class Lockstep:
    """Ranks of one target as a candidate for `compare`.  `variant`: of its graphs; `draft`: those that guess
    further tokens, and not the model's."""

    def __init__(
        self,
        artifact: Artifact,
        target: str,
        exact: bool = True,
        layers: int = 0,
        variant: str = "",
        draft: bool = False,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        """`held_bytes`: what a layer's weights may take in memory, in the type that is computed in; those beyond
        are widened at each use."""
        self.target, self.tp, self.layers, self.variant = target_named(target), artifact.tp, layers, variant
        self.graphs = of_variant((of_draft if draft else of_model)(artifact.graphs(target)), variant)
        self.programs = {role: parse(artifact.root / g.path) for role, g in self.graphs.items()}
        self.context = Context(exact, next(iter(self.programs.values())).dtype)
        self.held = Held(held_bytes)
        self.interpreter = self._interpreter(artifact)
        self.caches: list[list[torch.Tensor]] = []
        self.probes: dict[str, NDArray[np.float32]] = {}
        self.hidden: NDArray[np.float32] | None = None
        self.apart = 0.0
        self.page = self._cache_inputs[0].shape[1] or PAGE
        self.sequences = Sequences(0, self.page)

    def _interpreter(self, artifact: Artifact) -> Interpreter:
        """For all ranks, with the weights in their files.  Raises VerificationFailed if graphs read others."""
        for role, program in self.programs.items():
            check_declared(artifact, self.graphs[role], program)
        size = sum(t.nbytes for t in artifact.weights.tensors) * self.tp
        if size < SMALL_BYTES:
            torch.set_num_threads(1)  # handing small work to threads costs more than the work
        as_stored = read_as_stored(self.programs.values())
        self.ranks = [
            RankFiles(artifact, r, self.context, size <= KEEP_BYTES, held=self.held, as_stored=as_stored)
            for r in range(self.tp)
        ]
        return Interpreter(self.context, self.ranks, in_lockstep)

    @property
    def _cache_inputs(self) -> list[GraphInput]:
        return next(iter(self.graphs.values())).caches

    @property
    def has_all_tokens(self) -> bool:
        return VERIFY.name in self.programs

    def hear(self, recorder: Recorder | None) -> None:
        """Tell `recorder` of the codes of int8 products, from now on; nobody if that is None."""
        self.context = replace(self.context, codes=recorder)
        self.interpreter.context = self.context

    def begin(self, count: int) -> None:
        """Start over with so many empty sequences."""
        self.sequences = Sequences(count, self.page)
        self.caches = []

    def prefill(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        self.begin(len(prompts))
        return self._logits(PREFILL, prompts)

    def extend(self, tokens: list[list[int]]) -> NDArray[np.float32]:
        return self._logits(PREFILL, tokens)

    def decode(self, tokens: list[int]) -> NDArray[np.float32]:
        return self._logits(DECODE, [[t] for t in tokens])

    def extend_all(self, tokens: list[list[int]]) -> NDArray[np.float32]:
        """Logits of every new token, [T, V]."""
        return self._logits(VERIFY, tokens)

    def _logits(self, asked: Role, tokens: list[list[int]]) -> NDArray[np.float32]:
        return self.run(asked, tokens).get(LOGITS, np.zeros((0, 0), np.float32))

    def run(
        self, asked: Role, tokens: list[list[int]], hidden: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Append tokens to each sequence.  The outputs of rank 0, by name, of the graph that answers `asked`; none
        where only the first layers run.  `hidden` [T, ...]: what a draft's graph takes beside them."""
        graph, inputs = self._inputs(asked, tokens, hidden)
        self._reserve(self.sequences.num_pages)
        given = [[*inputs, *caches] for caches in self.caches]
        out = self.interpreter.run(self.programs[graph.role], given, self._stop)
        self.probes, self.apart = out.probes, max(self.apart, out.apart)
        found = out.outputs[0] if out.outputs else []
        outputs = {output.name: value for output, value in zip(graph.outputs, found, strict=False)}
        self.hidden = outputs.get(HIDDEN)
        return outputs

    @property
    def _stop(self) -> str:
        return f"model.layers.{self.layers}.input_layernorm.weight" if self.layers else ""

    def _inputs(
        self, asked: Role, tokens: list[list[int]], hidden: NDArray[np.float32] | None = None
    ) -> tuple[Graph, list[torch.Tensor]]:
        """Append tokens to each sequence: the graph for them, and its inputs but for the caches."""
        batch = self.sequences.advance(tokens)
        inputs: list[torch.Tensor] = [torch.from_numpy(a.copy()) for a in batch.arrays]
        graph = graph_for(self.graphs, asked, batch)
        if self.target.mask is not None:
            mask = attention_mask(ROLES[graph.role].begins, batch, self.target.mask)
            inputs.append(torch.from_numpy(mask).to(self.context.keep(self.context.dtype)))
        if hidden is not None:
            inputs.append(
                torch.from_numpy(fitting(graph, hidden).copy()).to(self.context.keep(self.context.dtype))
            )
        return graph, inputs

    @property
    def num_layers(self) -> int:
        """Those that run."""
        return self.layers or count_layers(self.programs.values())

    def executions(self, calls: list[Call]) -> tuple[list[Execution], list[list[str]]]:
        """Calls from empty sequences on, none of them begun, and the names of their outputs."""
        self.begin(len(calls[0].new))
        given = [self._inputs(call.role, call.new) for call in calls]
        self._reserve(self.sequences.num_pages)
        runs = [
            Execution(
                self.interpreter,
                self.programs[graph.role],
                [[*inputs, *caches] for caches in self.caches],
                self._stop,
            )
            for graph, inputs in given
        ]
        return runs, [[output.name for output in graph.outputs] for graph, _ in given]

    def together(
        self, executions: list[Execution], names: list[list[str]], begin: int = 0
    ) -> Iterator[tuple[int, list[Piece]]]:
        """All calls, layer by layer, or call by call where that may not be the same: (layers that are done,
        their pieces).  `begin`: the layer that comes next for executions that are that far."""
        if self.has_layers_apart:
            for layer, pieces in in_layers(executions, names, self.num_layers, begin):
                self.release(executions)
                self.apart = max(self.apart, *(e.apart for e in executions))
                yield layer + 1, pieces
            return
        for number, execution in enumerate(executions):
            probes = execution.advance(len(execution.program.nodes))
            found = piece(number, execution, probes, names[number], True)
            self.apart = max(self.apart, execution.apart)
            self.release(executions)
            yield 0, [found]

    def release(self, executions: list[Execution]) -> None:
        """Weights of a layer go; a value that lies where they do becomes a copy."""
        for execution in executions:
            for env in execution.values:
                for name, value in env.items():
                    if isinstance(value, torch.Tensor) and self.held.arena.has(value):
                        env[name] = value.clone()
        self.held.release()

    @property
    def has_layers_apart(self) -> bool:
        return keep_caches_apart(self.programs.values(), self.num_layers, len(self._cache_inputs))

    def _reserve(self, pages: int) -> None:
        shapes = [i.shape for i in self._cache_inputs]
        have = len(self.caches[0][0]) if self.caches else 0
        if have >= pages:
            return
        dtype = self.context.keep(self.context.dtype)
        for rank in range(self.tp):
            grown = [
                torch.zeros(max(pages, 2 * have), self.page, *(n or 1 for n in s[2:]), dtype=dtype) for s in shapes
            ]
            if have:
                for new, old in zip(grown, self.caches[rank], strict=True):
                    new[:have] = old
                self.caches[rank] = grown
            else:
                self.caches.append(grown)


def check_declared(artifact: Artifact, graph: Graph, program: Program) -> None:
    """The file has the parameters and as many outputs as its manifest entry says; the parameters have the shapes
    of the stored weights."""
    path = artifact.root / graph.path
    if program.num_outputs != len(graph.outputs):
        raise VerificationFailed(
            f"{path}: has {program.num_outputs} outputs, its manifest entry names {len(graph.outputs)}."
        )
    stored = {t.name: tuple(t.shape) for t in artifact.weights.tensors}
    listed = {p.name: (p.dtype, tuple(p.shape)) for p in graph.reads}
    for name, (dtype, shape) in program.declared.items():
        expected = listed.get(name)
        found = str(dtype).removeprefix("torch.")
        if expected != (found, shape) or stored.get(name, shape) != shape:
            raise VerificationFailed(
                f"{path}: its parameter {name} is {found} {list(shape)}; the manifest says "
                f"{expected}, the weights {stored.get(name)}."
            )
    if set(program.declared) != set(listed):
        odd = sorted(set(program.declared) ^ set(listed))
        raise VerificationFailed(f"{path}: its parameters are not the manifest's: {odd[:5]}.")


def in_lockstep(node: Node, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The collective of all ranks, over the group that graphs of ours name."""
    if node.attributes.get("group") != TP_GROUP:
        raise VerificationFailed(f"{node.where}: its group is {node.attributes.get('group')!r}, not {TP_GROUP!r}.")
    joined = join(node, parts)
    return [joined.clone() for _ in parts]
