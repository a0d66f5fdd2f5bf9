"""ONNX graphs as candidates of a proof: each form, by each runner, used as by somebody who keeps the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.artifact import Artifact, Graph
from msconv_runtime.errors import EnvironmentProblem, UsageError
from msconv_runtime.roles import DECODE, LOGITS, MIXED, PREFILL, of_variant
from msconv_runtime.targets import STATIC, Target

from ..reference import Logits
from ..scenario import Candidate
from .runners import ONNXRUNTIME, MakeRunner, Runner, check, runners

REFERENCE_BYTES = 2 << 30  # the reference computes in numpy, and holds what it widens


def begin(artifact: Artifact, target: Target, layers: int) -> None:
    """Raises VerificationFailed if ONNX's own check refuses a file, UsageError for --layers."""
    if layers:
        raise UsageError(
            "--layers: an ONNX graph is run as a whole, and shows logits only.", "Leave --layers out."
        )
    for graph in artifact.graphs(target.name):
        check(artifact, graph)


def most_positions(artifact: Artifact, target: Target) -> int | None:
    """So long may a sequence be in graphs of fixed shapes; None where there are none."""
    graphs = of_variant(artifact.graphs(target.name), STATIC)
    return min((g.caches[0].shape[2] or 0 for g in graphs.values()), default=None)


def runs_as_a_whole(artifact: Artifact, target: Target) -> str:
    """Why layers are not run each by itself."""
    return "an ONNX graph is run as a whole"


def candidates(artifact: Artifact, target: Target, layers: int) -> dict[str, Callable[[], Candidate]]:
    """By name: the graph for any shape first, "" by whoever is first.  Raises EnvironmentProblem for weights too
    large for the reference where onnxruntime is not installed."""
    makers = runners()
    if artifact.weights.nbytes > REFERENCE_BYTES:
        makers = {name: make for name, make in makers.items() if name == ONNXRUNTIME}
        if not makers:
            raise EnvironmentProblem(
                f"{artifact.root}: its weights are more than onnx.reference can run, and onnxruntime is not "
                "installed.",
                'Install it: pip install "msconv[onnxruntime]".',
            )
    graphs = artifact.graphs(target.name)
    whole, fixed = of_variant(graphs, "")[MIXED.name], of_variant(graphs, STATIC)
    first = next(iter(makers))
    found: dict[str, Callable[[], Candidate]] = {}
    for name, make in makers.items():
        found["" if name == first else name] = partial(AnyShape, artifact, whole, make)
    for name, make in makers.items() if fixed else ():
        found[STATIC if name == first else f"{STATIC} {name}"] = partial(FixedShapes, artifact, fixed, make)
    return found


class AnyShape:
    """All sequences as one batch, filled up on the right: what fills it lies in the cache, and nobody sees it."""

    has_all_tokens = True

    def __init__(self, artifact: Artifact, graph: Graph, make: MakeRunner) -> None:
        self.graph, self.run = graph, make(artifact, graph)
        self.mask = np.zeros((0, 0), np.int64)
        self.caches: dict[str, NDArray[np.float32]] = {}

    def prefill(self, prompts: list[list[int]]) -> Logits:
        self.mask = np.zeros((len(prompts), 0), np.int64)
        self.caches = {
            c.name: np.zeros((len(prompts), c.shape[1] or 0, 0, c.shape[3] or 0), np.float32)
            for c in self.graph.caches
        }
        return self.extend(prompts)

    def extend(self, tokens: list[list[int]]) -> Logits:
        return np.stack([rows[-1] for rows in self._rows(tokens)])

    def decode(self, tokens: list[int]) -> Logits:
        return self.extend([[t] for t in tokens])

    def extend_all(self, tokens: list[list[int]]) -> Logits:
        return np.concatenate(self._rows(tokens))

    def _rows(self, tokens: list[list[int]]) -> list[Logits]:
        """Logits of each sequence's new tokens."""
        ids, new = filled(tokens, max(map(len, tokens)))
        positions = self.mask.sum(1, keepdims=True) + new.cumsum(1) - 1
        self.mask = np.concatenate([self.mask, new], 1)
        out = self.run(
            {
                "input_ids": ids,
                "attention_mask": self.mask,
                "position_ids": np.maximum(positions, 0),
                **self.caches,
            }
        )
        self.caches = {name: out[present(name)] for name in self.caches}
        return [out[LOGITS][i, : len(t)] for i, t in enumerate(tokens)]


class FixedShapes:
    """Sequences in groups as large as the graphs' batch, prompts in pieces as long as the prefill graph takes."""

    has_all_tokens = True

    def __init__(self, artifact: Artifact, graphs: dict[str, Graph], make: MakeRunner) -> None:
        self.graphs: dict[str, tuple[Graph, Runner]] = {r: (g, make(artifact, g)) for r, g in graphs.items()}
        shape = graphs[PREFILL.name].caches[0].shape
        self.batch, self.context = shape[0] or 1, shape[2] or 0
        self.lengths: list[int] = []
        self.caches: list[dict[str, NDArray[np.float32]]] = []

    def prefill(self, prompts: list[list[int]]) -> Logits:
        caches = self.graphs[PREFILL.name][0].caches
        self.lengths = [0] * len(prompts)
        self.caches = [
            {c.name: np.zeros([n or 0 for n in c.shape[1:]], np.float32) for c in caches} for _ in prompts
        ]
        return self.extend(prompts)

    def extend(self, tokens: list[list[int]]) -> Logits:
        return np.stack([rows[-1] for rows in self._rows(PREFILL.name, tokens)])

    def decode(self, tokens: list[int]) -> Logits:
        return np.stack([rows[-1] for rows in self._rows(DECODE.name, [[t] for t in tokens])])

    def extend_all(self, tokens: list[list[int]]) -> Logits:
        return np.concatenate(self._rows(PREFILL.name, tokens))

    def _rows(self, role: str, tokens: list[list[int]]) -> list[Logits]:
        graph, run = self.graphs[role]
        piece = graph.inputs[0].shape[1] or 1
        found: list[list[Any]] = [[] for _ in tokens]
        for first in range(0, len(tokens), self.batch):
            group = range(first, min(first + self.batch, len(tokens)))
            for begin in range(0, max(len(tokens[i]) for i in group), piece):
                pieces = {i: tokens[i][begin : begin + piece] for i in group}
                for i, rows in self._piece(run, pieces, piece).items():
                    found[i].append(rows)
        return [np.concatenate(rows) for rows in found]

    def _piece(self, run: Runner, pieces: dict[int, list[int]], size: int) -> dict[int, Logits]:
        """One call.  A place of the batch that has no sequence sees nothing."""
        idle = self.batch - len(pieces)
        ids, new = filled([*pieces.values(), *[[]] * idle], size)
        lengths = [self.lengths[i] for i in pieces] + [0] * idle
        kept = (np.arange(self.context) < np.array(lengths)[:, None]).astype(np.int64)
        positions = np.array(lengths)[:, None] + new.cumsum(1) - 1
        empty = [next(iter(self.caches))] * idle
        caches = {
            name: np.stack([cache[name] for cache in [self.caches[i] for i in pieces] + empty])
            for name in self.caches[0]
        }
        mask = np.concatenate([kept, new], 1)
        out = run({"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(positions, 0), **caches})
        for row, (i, tokens) in enumerate(pieces.items()):
            begin, count = self.lengths[i], len(tokens)
            for name, cache in self.caches[i].items():
                cache[:, begin : begin + count] = out[present(name)][row, :, :count]
            self.lengths[i] += count
        return {i: out[LOGITS][row, : len(t)] for row, (i, t) in enumerate(pieces.items())}


def filled(tokens: list[list[int]], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens as rows of one size, and 1 where there is one."""
    ids, there = (np.zeros((len(tokens), size), np.int64) for _ in range(2))
    for row, of_row in enumerate(tokens):
        ids[row, : len(of_row)] = of_row
        there[row, : len(of_row)] = 1
    return ids, there


def present(past: str) -> str:
    """The output that continues a cache."""
    return past.replace("past_key_values", "present", 1)
