"""Weights of one rank, by the names that a graph's parameters carry, through the safetensors library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from msconv_runtime.artifact import Artifact
from msconv_runtime.errors import VerificationFailed

from ..mindir.kernels import Context
from ..mindir.program import Program
from .arena import Arena

# Kernels that widen what they take of a weight: rows that are looked up, experts that are chosen.
WIDEN_PARTS = {"Gather", "GroupedMatmulV4", "Load", "MakeTuple"}
ROWS, EXPERTS = ":Rows", ":Experts"


class Held:
    """Weights that stay in memory while a layer runs, of all ranks together.  What does not fit is read anew at
    each use."""

    def __init__(self, limit_bytes: int) -> None:
        self.arena = Arena(limit_bytes)
        self._values: dict[tuple[int, str], torch.Tensor] = {}

    def get(self, rank: int, name: str) -> torch.Tensor | None:
        return self._values.get((rank, name))

    def widened(self, rank: int, name: str, stored: torch.Tensor) -> torch.Tensor | None:
        """A weight in float32, kept; None where there is no room."""
        value = self.arena.widened(stored)
        if value is not None:
            self._values[rank, name] = value
        return value

    def release(self) -> None:
        """The layer is done: its weights are used no more."""
        self._values.clear()
        self.arena.clear()


def read_as_stored(programs: Iterable[Program]) -> frozenset[str]:
    """Weights of half types that need not be widened as a whole: wherever they are used, a kernel widens the part
    that it takes."""
    widened: set[str] = set()
    known: set[str] = set()
    for program in programs:
        of = dict(program.parameters)
        for node in program.nodes:
            for name in node.inputs:
                if name not in of:
                    continue
                known.add(of[name])
                if not (node.kind in WIDEN_PARTS or node.kind.endswith((ROWS, EXPERTS))):
                    widened.add(of[name])
                elif node.kind in ("Load", "MakeTuple"):
                    of[node.output] = of[name]
    return frozenset(known - widened)


class RankFiles:
    """One rank's weights by name, in the type this mode computes in."""

    def __init__(
        self,
        artifact: Artifact,
        rank: int,
        context: Context,
        keep: bool,
        as_bound: bool = False,
        held: Held | None = None,
        as_stored: frozenset[str] = frozenset(),
    ) -> None:
        """`keep`: all of them in memory, else those in `held`.  `as_bound`: values are rounded to the type that
        the graph declares, as a server binds them.  `as_stored`: names that are not widened."""
        self.context, self.keep, self.as_bound = context, keep, as_bound
        self.rank, self.held, self.as_stored = rank, held, as_stored
        self._cache: dict[str, torch.Tensor] = {}
        self._where: dict[str, Path] = {}
        for file in artifact.weights.files:
            if file.rank == rank:
                path = artifact.root / file.path
                with safe_open(path, framework="pt") as opened:
                    self._where |= dict.fromkeys(opened.keys(), path)

    def lend(self, name: str, value: torch.Tensor) -> None:
        """A weight that is in no file of this artifact: its graphs take it from another one's."""
        self._cache[name] = value

    def get(self, name: str, declared: torch.dtype | None) -> torch.Tensor:
        """In exact mode stored values in float32; else cast to the type the graph declares."""
        if name in self._cache:
            return self._cache[name]
        found = self.held.get(self.rank, name) if self.held is not None else None
        if found is not None:
            return found
        if name not in self._where:
            raise VerificationFailed(f"{name}: wanted by the graph, in no weight file of this rank.")
        with safe_open(self._where[name], framework="pt") as opened:  # kept open, its pages stay in memory
            stored = opened.get_tensor(name)
            if self.context.exact and not self.keep and name in self.as_stored and stored.is_floating_point():
                return stored
            if self.held is not None and self._only_widens(stored, declared):
                found = self.held.widened(self.rank, name, stored)
            value = self._computed(stored, declared) if found is None else found
        if self.keep:
            self._cache[name] = value
        return value

    def _only_widens(self, stored: torch.Tensor, declared: torch.dtype | None) -> bool:
        widens = self.context.exact and not self.keep and not self.as_bound and declared != torch.int64
        return widens and stored.is_floating_point()

    def _computed(self, stored: torch.Tensor, declared: torch.dtype | None) -> torch.Tensor:
        """A copy in the type that is computed in."""
        to = stored.dtype
        if declared == torch.int64 and stored.dtype == torch.float32:
            stored, to = stored.view(torch.int32), torch.int64  # a scale's bits, see RankWeights.array
        elif stored.is_floating_point():
            stored = stored.to(declared) if self.as_bound and declared else stored
            to = torch.float32 if self.context.exact else declared or to
        return stored.to(to, copy=True)
