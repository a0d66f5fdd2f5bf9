"""Kinds of draft, a record each: what guesses further tokens for a model, from its hidden states.

Every DraftKind that a file in this directory makes is one: a new kind is a new file, and no line here.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .record import LAYER_IDS, OBJECT, DraftKind

DRAFT_KINDS: dict[str, DraftKind] = {
    value.name: value
    for name in sorted(module.name for module in iter_modules(__path__))
    for value in vars(import_module(f"{__name__}.{name}")).values()
    if isinstance(value, DraftKind)
}
OF_LAYERS = {name: kind for name, kind in DRAFT_KINDS.items() if kind.is_layer}  # among a model's own weights
OF_CHECKPOINTS = {name: kind for name, kind in DRAFT_KINDS.items() if not kind.is_layer}
TITLES = " or ".join(kind.title for kind in OF_CHECKPOINTS.values())

__all__ = ["DRAFT_KINDS", "LAYER_IDS", "OBJECT", "OF_CHECKPOINTS", "OF_LAYERS", "TITLES", "DraftKind"]
