"""Weight rules: what one output tensor is made of.  Frozen values; a family is a table of them."""

from __future__ import annotations

from dataclasses import dataclass

from .cuts import Cut


@dataclass(frozen=True, slots=True)
class Part:
    """One source tensor: its name (`{layer}` is a hole), its shape as dimension names, and its cut."""

    src: str
    shape: tuple[str, ...]
    cut: Cut


@dataclass(frozen=True, slots=True)
class Rule:
    """One output tensor: its parts joined along rows, in order.  `when` names a trait of the model that
    must hold; `dtype` pins an element type against `--dtype`."""

    dst: str
    parts: tuple[Part, ...]
    when: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Drop:
    """Source tensors left out on purpose.  `pattern` is a glob; the reason is shown to people.
    `twin`: a tensor that must hold the same bytes, or dropping would lose something."""

    pattern: str
    reason: str
    when: str = ""
    twin: str = ""


def keep(name: str, shape: tuple[str, ...], cut: Cut, when: str = "", dtype: str = "") -> Rule:
    """A tensor under its own name."""
    return Rule(name, (Part(name, shape, cut),), when, dtype)


def fuse(dst: str, *parts: Part, when: str = "") -> Rule:
    """Several tensors, each cut by itself, joined along rows."""
    return Rule(dst, parts, when)
