"""Weight rules: what one output tensor is made of.  Frozen values; a family is a table of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .cuts import Cut

OWN = "own"  # as `dtype` of a rule: whatever the checkpoint has


@dataclass(frozen=True, slots=True)
class Part:
    """One source tensor: its name (`{layer}` and `{expert}` are holes), its shape as dimension names, its cut."""

    src: str
    shape: tuple[str, ...]
    cut: Cut


@dataclass(frozen=True, slots=True)
class Rule:
    """One output tensor: its parts joined along rows, in order.

    `stacked`: one matrix for each of a rank's experts, [E, in, out], as grouped matrix products want them: each
    part transposed, side by side.  `when` names traits of the model or of the layer, all of which must hold.
    `dtype` pins an element type against `--dtype`; OWN keeps the checkpoint's.  `as_values`: its matrix is not
    quantised, whatever is asked; `is_plain`: nor is it in published checkpoints.  `optional`: left out where the
    checkpoint has no such tensor.
    """

    dst: str
    parts: tuple[Part, ...]
    when: str = ""
    dtype: str = ""
    stacked: bool = False
    as_values: bool = False
    optional: bool = False
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class Drop:
    """Source tensors left out on purpose.  `pattern` is a glob, `{draft}` the numbers of the layers after the last
    that are taken as a draft, `{mtp}` of those that are not; the reason is shown to people.  `twin`: a tensor that
    must hold the same bytes, or dropping would lose something."""

    pattern: str
    reason: str
    when: str = ""
    twin: str = ""


def keep(
    name: str, shape: tuple[str, ...], cut: Cut, when: str = "", dtype: str = "", as_values: bool = False
) -> Rule:
    """A tensor under its own name."""
    return Rule(name, (Part(name, shape, cut),), when, dtype, as_values=as_values)


def plain(name: str, shape: tuple[str, ...], cut: Cut) -> Rule:
    """A matrix that quantised checkpoints have as values too."""
    return Rule(name, (Part(name, shape, cut),), as_values=True, is_plain=True)


def maybe(name: str, shape: tuple[str, ...], cut: Cut) -> Rule:
    """A tensor that some checkpoints have, in their own element type."""
    return Rule(name, (Part(name, shape, cut),), dtype=OWN, optional=True)


def take(dst: str, src: str, shape: tuple[str, ...], cut: Cut) -> Rule:
    """Some of a tensor, under another name; never quantised."""
    return Rule(dst, (Part(src, shape, cut),), as_values=True)


def fuse(dst: str, *parts: Part, when: str = "") -> Rule:
    """Several tensors, each cut by itself, joined along rows."""
    return Rule(dst, parts, when)


def stack(dst: str, *parts: Part, when: str = "") -> Rule:
    """One tensor of all experts of a rank, [E, in, out]; the parts' outputs lie side by side."""
    return Rule(dst, parts, when, stacked=True)


def only(when: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules, for layers or models that have this trait besides those that the rules want themselves."""
    return tuple(replace(rule, when=f"{when} {rule.when}".rstrip()) for rule in rules)
