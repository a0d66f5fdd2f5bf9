"""A model to lay out: named sizes, traits, and its weight table."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

from msconv_runtime.dtypes import DTYPES

from ..quant import PLAIN, WeightFormat, kept_format
from .rules import OWN, Drop, Part, Rule


@dataclass(frozen=True, slots=True)
class Sizes:
    """`dims`: named sizes (`hidden`, `heads`, ...).  `traits` and, by layer, `layer_traits`: names that rules
    ask for in `when`.  `formats`: in which matrices may be stored besides plain, as the configuration says.
    `drafts`: layers after the last that are taken to guess further tokens."""

    dims: Mapping[str, int]
    layers: int
    traits: frozenset[str]
    layer_traits: tuple[frozenset[str], ...] = ()
    formats: tuple[WeightFormat, ...] = ()
    drafts: int = 0

    @property
    def draft_layers(self) -> range:
        """Their numbers."""
        return range(self.layers, self.layers + self.drafts)

    def is_of_draft(self, name: str) -> bool:
        """Whether a tensor belongs to one of them."""
        return name.startswith(tuple(f"model.layers.{i}." for i in self.draft_layers))

    def holds(self, when: str, layer: int | None = None) -> bool:
        """Whether the model, or this layer of it, has all traits that `when` names."""
        of_layer = self.layer_traits[layer] if layer is not None and self.layer_traits else ()
        return all(trait in self.traits or trait in of_layer for trait in when.split())

    @property
    def experts(self) -> int:
        return self.dims.get("experts", 0)

    def shape(self, part: Part) -> tuple[int, ...]:
        """The whole model's, of what a rule names."""
        return tuple(self.dims[d] for d in part.shape)


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
    """One output of the model and the sources it is made of.  Of a stacked one, expert by expert."""

    rule: Rule
    name: str
    sources: tuple[tuple[Part, str], ...]


def present(outputs: list[Output], sources: Container[str]) -> list[Output]:
    """Those outputs that are made: all but optional ones that the checkpoint has not."""
    return [o for o in outputs if not o.rule.optional or o.sources[0][1] in sources]


def is_matrix(rule: Rule, part: Part) -> bool:
    """Whether a weight format may store it: a matrix whose element type no rule pins."""
    return len(part.shape) == 2 and not rule.dtype


def expand(table: Table, sizes: Sizes) -> list[Output]:
    """Every output.  What comes before the layers, the layers one by one, what comes after, then drafts."""
    first = next((i for i, r in enumerate(table.rules) if "{layer}" in r.dst), len(table.rules))
    layered = [r for r in table.rules if "{layer}" in r.dst]
    single = [r for r in table.rules if "{layer}" not in r.dst and sizes.holds(r.when)]
    head = [r for r in single if table.rules.index(r) < first]
    out = [_output(rule, sizes, None) for rule in head]

    def of_layers(layers: range) -> list[Output]:
        return [_output(rule, sizes, i) for i in layers for rule in layered if sizes.holds(rule.when, i)]

    out += of_layers(range(sizes.layers))
    out += [_output(rule, sizes, None) for rule in single if rule not in head]
    return out + of_layers(sizes.draft_layers)


def _output(rule: Rule, sizes: Sizes, layer: int | None) -> Output:
    def name(template: str, expert: int = 0) -> str:
        return template.replace("{layer}", str(layer)).replace("{expert}", str(expert))

    experts = range(sizes.experts) if rule.stacked else range(1)
    return Output(rule, name(rule.dst), tuple((p, name(p.src, e)) for e in experts for p in rule.parts))


def _expected(rule: Rule, matrix: str, formats: tuple[WeightFormat, ...]) -> WeightFormat:
    """The format in which a configuration says that a matrix is stored."""
    return next((f for f in formats if f.expects(matrix) and (f.has_values or not rule.as_values)), PLAIN)


def expected_sources(
    table: Table, sizes: Sizes, dtype: str, own: Mapping[str, str] | None = None, quantised: bool = False
) -> dict[str, TensorInfo]:
    """Every source tensor that the configuration promises, with its shape: headers without a checkpoint.

    `own`: element types of an artifact's tensors by name, for rules that keep the checkpoint's and for what is
    kept as codes.  `quantised`: the matrices of all layers are stored in the configuration's formats, as published
    checkpoints do it."""
    out: dict[str, TensorInfo] = {}
    stored = own or {}
    for output in present(expand(table, sizes), stored):
        for part, name in output.sources:
            shape = sizes.shape(part)
            weight_format: WeightFormat = PLAIN
            if is_matrix(output.rule, part):
                weight_format = kept_format(output.name, stored, sizes.formats)
                if quantised and not part.cut.pad and not output.rule.is_plain:
                    weight_format = _expected(output.rule, name, sizes.formats)
            if weight_format is PLAIN:
                kind = output.rule.dtype or dtype
                kind = stored.get(output.name, dtype) if kind == OWN else kind
                out[name] = TensorInfo(name, kind, shape, nbytes=DTYPES[kind].nbytes * math.prod(shape))
                continue
            for tensor in weight_format.sources:
                kind = stored.get(tensor.of(output.name), tensor.dtype or dtype)
                size = tensor.shape(*shape)
                info = TensorInfo(tensor.of(name), kind, size, nbytes=DTYPES[kind].nbytes * math.prod(size))
                out[info.name] = info
    return out
