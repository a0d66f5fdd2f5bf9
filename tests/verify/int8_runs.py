"""Graphs of small int8 models, exported, interpreted with random weights, and their codes by sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from msconv.graph.export import export
from msconv.graph.spec import Exported, Local
from msconv.layout.cuts import make_mesh
from msconv.mindir.codes import Codes
from msconv.mindir.interpreter import Interpreter, Step
from msconv.mindir.kernels import Context
from msconv.mindir.program import Program, parse_bytes
from msconv.verify.lockstep import in_lockstep
from msconv_runtime.paging import Sequences, attention_mask
from msconv_runtime.roles import ROLES
from msconv_runtime.targets import target_named
from tests.exports import config_named
from tests.int8 import Array, Int8Types, RandomWeights, quantised
from tests.verify.int8_reference import Lead, Reference

PAGE = 16


@dataclass(frozen=True)
class Model:
    """A model of tests.exports, how its matrices are kept, its layout, and whether its norms have biases."""

    name: str
    kind: str
    tp: int = 1
    ep: int = 1
    shifted: bool = False

    def local(self, target: str, role: str, variant: str = "") -> Local:
        config, types = quantised(config_named(self.name)), Int8Types(self.kind, self.shifted)
        return Local(config, make_mesh(self.tp, self.ep), target_named(target), ROLES[role], variant, types)


class Run:
    """All ranks of a model on one target."""

    def __init__(self, model: Model, target: str, roles: dict[str, str], exact: bool = True) -> None:
        """`roles`: of the graphs, with their variants."""
        self.locals = {role: model.local(target, role, variant) for role, variant in roles.items()}
        self.exports: dict[str, Exported] = {role: export(local) for role, local in self.locals.items()}
        self.programs: dict[str, Program] = {
            role: parse_bytes(made.proto, role) for role, made in self.exports.items()
        }
        self.local = next(iter(self.locals.values()))
        self.codes = Codes()
        context = Context(exact, next(iter(self.programs.values())).dtype, self.codes)
        declared = {name: shape for p in self.programs.values() for name, (_, shape) in p.declared.items()}
        mesh = self.local.mesh
        held = self.local.moe.experts // mesh.ep if self.local.config.moe else 0
        self.weights = [RandomWeights(declared, r, mesh.ep_rank(r) * held) for r in mesh.ranks]
        self.context = context
        self.interpreter = Interpreter(context, self.weights, in_lockstep)
        self.sequences, self.caches = Sequences(0, 1), list[list[torch.Tensor]]()

    def begin(self, count: int, pages: int = 48) -> None:
        page = self.local.target.paging.slots or PAGE
        self.sequences = Sequences(count, page)
        shapes = [i.shape for made in self.exports.values() for i in made.inputs if i.kind == "cache"]
        shapes = shapes[: len(shapes) // len(self.exports)]
        dtype = self.context.keep(self.context.dtype)
        self.caches = [
            [torch.zeros(pages, page, *(n or 1 for n in s[2:]), dtype=dtype) for s in shapes]
            for _ in self.local.mesh.ranks
        ]

    def call(self, role: str, tokens: list[list[int]]) -> Step:
        batch = self.sequences.advance(tokens)
        inputs = [torch.from_numpy(a.copy()) for a in batch.arrays]
        if self.local.target.mask is not None:
            mask = attention_mask(ROLES[role].begins, batch, self.local.target.mask)
            inputs.append(torch.from_numpy(mask).to(self.context.keep(self.context.dtype)))
        return self.interpreter.run(self.programs[role], [[*inputs, *caches] for caches in self.caches])

    def codes_of(self, sequence: int, counts: list[list[int]]) -> dict[tuple[int, str], Array]:
        """A sequence's codes in all calls, one after the other.  `counts`: each call's new tokens by sequence."""
        found: dict[tuple[int, str], list[Array]] = {}
        for call, of_call in zip(self.codes.calls, counts, strict=True):
            first = sum(of_call[:sequence])
            for key, record in call.items():
                assert len(record.codes) == sum(of_call), key
                found.setdefault(key, []).append(record.codes[first : first + of_call[sequence]].numpy())
        return {key: np.concatenate(parts) for key, parts in found.items()}

    def reference(self, sequence: int, counts: list[list[int]]) -> Reference:
        lead = Lead(self.codes_of(sequence, counts))
        return Reference(self.local.config, self.local.mesh, [w.of for w in self.weights], lead)
