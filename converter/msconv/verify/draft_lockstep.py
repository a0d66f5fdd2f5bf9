"""All ranks of a draft's shipped graphs, executed together, in place of a server's own run."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from msconv_runtime.artifact import OF_TARGET, Artifact
from msconv_runtime.graphs import fitting
from msconv_runtime.paging import Batch, attention_mask
from msconv_runtime.roles import ROLES, Role, graph_for, of_draft, of_variant
from msconv_runtime.targets import Target

from ..mindir.interpreter import Interpreter
from ..mindir.kernels import Context
from ..mindir.program import parse
from .lockstep import PAGE, check_declared, in_lockstep
from .rank_files import RankFiles


class DraftLockstep:
    """`parts`: each rank's rows of the target's embedding."""

    def __init__(self, artifact: Artifact, target: Target, parts: Iterable[NDArray[np.float32]]) -> None:
        self.target, self.apart = target, 0.0
        self.graphs = of_variant(of_draft(artifact.graphs(target.name)), "")
        self.programs = {role: parse(artifact.root / g.path) for role, g in self.graphs.items()}
        for role, program in self.programs.items():
            check_declared(artifact, self.graphs[role], program)
        self.context = Context(True, next(iter(self.programs.values())).dtype)
        self.ranks = [RankFiles(artifact, rank, self.context, keep=True) for rank in range(artifact.tp)]
        for rank, (files, part) in enumerate(zip(self.ranks, parts, strict=True)):
            files.lend(OF_TARGET + "model.embed_tokens.weight", torch.from_numpy(part))
            files.lend(OF_TARGET + "vocab_start", torch.tensor([rank * len(part)], dtype=torch.int32))
        self.interpreter = Interpreter(self.context, self.ranks, in_lockstep)
        self.shapes = [cache.shape for cache in next(iter(self.graphs.values())).caches]
        self.page = self.shapes[0][1] or PAGE
        self.caches: list[list[torch.Tensor]] = [[] for _ in self.ranks]

    def run(self, asked: Role, batch: Batch, hidden: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The outputs of rank 0, by name, of the graph that answers `asked`."""
        self._reserve(int(batch.block_tables.max()) + 1)
        graph = graph_for(self.graphs, asked, batch)
        keep = self.context.keep(self.context.dtype)
        inputs: list[torch.Tensor] = [torch.from_numpy(a.copy()) for a in batch.arrays]
        if self.target.mask is not None:
            mask = attention_mask(ROLES[graph.role].begins, batch, self.target.mask)
            inputs.append(torch.from_numpy(mask).to(keep))
        inputs.append(torch.from_numpy(fitting(graph, hidden)).to(keep))
        out = self.interpreter.run(self.programs[graph.role], [[*inputs, *caches] for caches in self.caches], "")
        self.apart = max(self.apart, out.apart)
        return {output.name: value for output, value in zip(graph.outputs, out.outputs[0], strict=True)}

    def _reserve(self, pages: int) -> None:
        dtype = self.context.keep(self.context.dtype)
        for caches in self.caches:
            if caches and len(caches[0]) >= pages:
                continue
            grown = [torch.zeros(2 * pages, self.page, *(n or 1 for n in s[2:]), dtype=dtype) for s in self.shapes]
            for new, old in zip(grown, list(caches), strict=False):
                new[: len(old)] = old
            caches[:] = grown
