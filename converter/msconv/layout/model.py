"""What planning needs to know of a model: sizes by name, traits, and its weight table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .dtypes import SIZES
from .rules import Drop, Rule


@dataclass(frozen=True, slots=True)
class Sizes:
    """`dims`: named sizes (`hidden`, `heads`, ...).  `traits`: names that rules ask for in `when`."""

    dims: Mapping[str, int]
    layers: int
    traits: frozenset[str]

    def holds(self, when: str) -> bool:
        return not when or when in self.traits


@dataclass(frozen=True, slots=True)
class Table:
    """The weight table of a family."""

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A source tensor as its header states it.  `offset` and `nbytes` within its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0
    nbytes: int = 0


def expand(table: Table, sizes: Sizes) -> list[tuple[Rule, str, dict[str, str]]]:
    """Every output tensor: (rule, output name, {source template: source name}).  Layers outermost."""
    out: list[tuple[Rule, str, dict[str, str]]] = []
    head: list[Rule] = []
    tail: list[Rule] = []
    layered: list[Rule] = []
    for rule in table.rules:
        if sizes.holds(rule.when):
            (layered if "{layer}" in rule.dst else tail if layered else head).append(rule)
    for rule in head:
        out.append((rule, rule.dst, {p.src: p.src for p in rule.parts}))
    for layer in range(sizes.layers):
        for rule in layered:
            names = {p.src: p.src.replace("{layer}", str(layer)) for p in rule.parts}
            out.append((rule, rule.dst.replace("{layer}", str(layer)), names))
    for rule in tail:
        out.append((rule, rule.dst, {p.src: p.src for p in rule.parts}))
    return out


def expected_sources(table: Table, sizes: Sizes, dtype: str) -> dict[str, TensorInfo]:
    """Every source tensor that the configuration promises, with its shape: headers without a checkpoint."""
    out: dict[str, TensorInfo] = {}
    for rule, _, names in expand(table, sizes):
        for part in rule.parts:
            name, kind = names[part.src], rule.dtype or dtype
            shape = tuple(sizes.dims[d] for d in part.shape)
            out[name] = TensorInfo(name, kind, shape, nbytes=SIZES[kind] * math.prod(shape))
    return out
