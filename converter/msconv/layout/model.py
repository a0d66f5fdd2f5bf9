"""What planning needs to know of a model: sizes by name, traits, and its weight table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .dtypes import FP8, SIZES
from .rules import OWN, Drop, Part, Rule

SCALE = "_scale_inv"  # what the name of a block-quantised tensor's scales ends with


@dataclass(frozen=True, slots=True)
class Sizes:
    """`dims`: named sizes (`hidden`, `heads`, ...).  `traits` and, by layer, `layer_traits`: names that rules
    ask for in `when`.  `block`: rows and columns that share one scale in quantised tensors; (0, 0) if none is.
    """

    dims: Mapping[str, int]
    layers: int
    traits: frozenset[str]
    layer_traits: tuple[frozenset[str], ...] = ()
    block: tuple[int, int] = (0, 0)

    def holds(self, when: str, layer: int | None = None) -> bool:
        """Whether the model, or this layer of it, has all traits that `when` names."""
        of_layer = self.layer_traits[layer] if layer is not None and self.layer_traits else ()
        return all(trait in self.traits or trait in of_layer for trait in when.split())

    @property
    def experts(self) -> int:
        return self.dims.get("experts", 0)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales of a quantised matrix."""
        return -(-shape[0] // self.block[0]), -(-shape[1] // self.block[1])


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


@dataclass(frozen=True, slots=True)
class Output:
    """One output tensor of the model and the sources it is made of.  Of a stacked one, expert by expert."""

    rule: Rule
    name: str
    sources: tuple[tuple[Part, str], ...]


def expand(table: Table, sizes: Sizes) -> list[Output]:
    """Every output tensor.  What comes before the layers, the layers one by one, what comes after."""
    first = next((i for i, r in enumerate(table.rules) if "{layer}" in r.dst), len(table.rules))
    layered = [r for r in table.rules if "{layer}" in r.dst]
    single = [r for r in table.rules if "{layer}" not in r.dst and sizes.holds(r.when)]
    head = [r for r in single if table.rules.index(r) < first]
    out = [_output(rule, sizes, None) for rule in head]
    for layer in range(sizes.layers):
        out += [_output(rule, sizes, layer) for rule in layered if sizes.holds(rule.when, layer)]
    return out + [_output(rule, sizes, None) for rule in single if rule not in head]


def _output(rule: Rule, sizes: Sizes, layer: int | None) -> Output:
    def name(template: str, expert: int = 0) -> str:
        return template.replace("{layer}", str(layer)).replace("{expert}", str(expert))

    experts = range(sizes.experts) if rule.stacked else range(1)
    return Output(rule, name(rule.dst), tuple((p, name(p.src, e)) for e in experts for p in rule.parts))


def expected_sources(
    table: Table, sizes: Sizes, dtype: str, own: Mapping[str, str] | None = None, quantised: bool = False
) -> dict[str, TensorInfo]:
    """Every source tensor that the configuration promises, with its shape: headers without a checkpoint.
    `own`: element types by output name, for rules that keep the checkpoint's.  `quantised`: with blocks, the
    matrices of all layers are FP8 and have scales, as published."""
    out: dict[str, TensorInfo] = {}
    narrow = quantised and sizes.block[0] > 0
    for output in expand(table, sizes):
        kind = output.rule.dtype or dtype
        if kind == OWN:
            kind = (own or {}).get(output.name, dtype)
        for part, name in output.sources:
            shape = tuple(sizes.dims[d] for d in part.shape)
            if narrow and len(shape) == 2 and not output.rule.dtype and not part.cut.pad:
                scale = sizes.scale_shape(shape)
                out[name] = TensorInfo(name, FP8, shape, nbytes=math.prod(shape))
                out[name + SCALE] = TensorInfo(name + SCALE, "float32", scale, nbytes=4 * math.prod(scale))
                continue
            out[name] = TensorInfo(name, kind, shape, nbytes=SIZES[kind] * math.prod(shape))
    return out
