"""Manifests of format 1, in which a graph had a phase: read as today's.

A phase is a role, and for the phase `native` the variant of compiled kernels.  Caches were known by their names,
and each graph gave logits."""

from __future__ import annotations

import msgspec

from ..targets import CPU, TARGETS
from .manifest import (
    FORMAT,
    Graph,
    GraphInput,
    GraphOutput,
    GraphParameter,
    InputKind,
    Manifest,
    Model,
    Parallel,
    Rehearsed,
    Verified,
    Weights,
)

ROLES = {"native": ("mixed", "compiled"), "decode_all": ("verify", "")}
UNLIKE = (".experts.", ".kv_a_proj")  # weights of graphs for prefill and decode that are not alike in all else


class Graph1(msgspec.Struct, frozen=True):
    target: str
    phase: str
    path: str
    size: int
    digest: str
    mindspore: str
    nodes: int
    inputs: list[GraphInput]
    parameters: list[GraphParameter]
    groups: list[str] = []
    nz: list[str] = []
    kinds: dict[str, int] = {}


class Manifest1(msgspec.Struct, frozen=True):
    format: int
    tool: str
    model: Model
    parallel: Parallel
    weights: Weights | None = None
    graphs: list[Graph1] = []
    verified: list[Verified] = []
    rehearsed: list[Rehearsed] = []


def decode(data: bytes) -> Manifest:
    """Raises msgspec.DecodeError if it is none."""
    old = msgspec.json.decode(data, type=Manifest1)
    fields = {name: getattr(old, name) for name in Manifest1.__struct_fields__}
    return Manifest(**fields | {"format": FORMAT, "graphs": [_graph(g) for g in old.graphs]})


def _graph(g: Graph1) -> Graph:
    role, variant = ROLES.get(g.phase, (g.phase, ""))
    return Graph(
        target=g.target,
        role=role,
        variant=variant,
        path=g.path,
        size=g.size,
        digest=g.digest,
        mindspore=g.mindspore,
        nodes=g.nodes,
        inputs=[GraphInput(i.name, i.dtype, i.shape, _kind(i.name)) for i in g.inputs],
        outputs=[GraphOutput("logits", "float32", [None, None])],
        reads=g.parameters,
        min_sequences=_min_sequences(g),
        groups=g.groups,
        nz=g.nz,
        kinds=g.kinds,
    )


def _kind(name: str) -> InputKind:
    if "_cache." in name:
        return "cache"
    return "mask" if name == "attention_mask" else "batch"


def _min_sequences(g: Graph1) -> int:
    alike = not any(part in p.name for p in g.parameters for part in UNLIKE)
    target = TARGETS.get(g.target, CPU)
    return target.decode_min_sequences if g.phase == "decode" and alike else 0
