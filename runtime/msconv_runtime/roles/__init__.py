"""Graph roles: what a compiled graph is for, a record each, and which graph runs a batch.

Every Role that a file in this directory makes is one: a new role is a new file, and no line here.  A target's
record says which roles it has graphs for.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from ..errors import ArtifactError
from ..targets import TARGETS
from .drafting import DRAFT_DECODE, DRAFT_EXTEND
from .record import HIDDEN, LOGITS, Role
from .serving import DECODE, MIXED, PREFILL, VERIFY

if TYPE_CHECKING:
    from ..artifact import Graph
    from ..paging import Batch

COMPILED = "compiled"  # the variant whose operations are compiled kernels; "" has MindSpore's own

ROLES: dict[str, Role] = {
    value.name: value
    for name in sorted(module.name for module in iter_modules(__path__))
    for value in vars(import_module(f"{__name__}.{name}")).values()
    if isinstance(value, Role)
}


def of_variant(graphs: Iterable[Graph], variant: str) -> dict[str, Graph]:
    """By role: the graphs of a variant."""
    return {g.role: g for g in graphs if g.variant == variant}


def of_model(graphs: Iterable[Graph]) -> list[Graph]:
    """Those that run the model itself, and not its draft."""
    return [g for g in graphs if not ROLES[g.role].is_draft]


def of_draft(graphs: Iterable[Graph]) -> list[Graph]:
    """Those that guess further tokens."""
    return [g for g in graphs if ROLES[g.role].is_draft]


def best_variant(graphs: Iterable[Graph]) -> list[Graph]:
    """The graphs of a target that serve where their kernels can be had: compiled ones if there are any."""
    of_all = list(graphs)
    return [g for g in of_all if g.variant == COMPILED] or of_all


def graph_for(graphs: dict[str, Graph], asked: Role, batch: Batch) -> Graph:
    """The graph, of those by role, that answers `asked` for the batch.  Raises ArtifactError if there is none.

    A mixed graph runs every batch.  A prefill graph that attends to new tokens only leaves batches with a cached
    prefix to the decode graph; a decode graph that is slow for few sequences leaves those to the prefill graph.
    Of a draft the same holds; without a graph for one token, the other one runs every batch.
    """
    if asked.is_draft:
        return _draft_graph_for(graphs, asked, batch)
    role = asked.name
    if asked in (PREFILL, DECODE) and MIXED.name in graphs:
        role = MIXED.name
    elif asked is PREFILL and has_prefix(batch) and not reads_cache(graphs[PREFILL.name]):
        role = DECODE.name
    elif asked is DECODE and len(batch.q_lens) < graphs[DECODE.name].min_sequences:
        role = PREFILL.name
    return _named(graphs, role)


def _draft_graph_for(graphs: dict[str, Graph], asked: Role, batch: Batch) -> Graph:
    has_decode = DRAFT_DECODE.name in graphs
    extends = _named(graphs, DRAFT_EXTEND.name)
    if not has_decode or (asked is DRAFT_EXTEND and (reads_cache(extends) or not has_prefix(batch))):
        return extends
    return graphs[DRAFT_DECODE.name]


def _named(graphs: dict[str, Graph], role: str) -> Graph:
    if role not in graphs:
        raise ArtifactError(f"no {role} graph among {', '.join(sorted(graphs)) or 'none'}.", "Compile again.")
    return graphs[role]


def can_serve(graphs: dict[str, Graph]) -> bool:
    """Whether graphs, by role, can prefill and decode."""
    return MIXED.name in graphs or {PREFILL.name, DECODE.name} <= graphs.keys()


def gives_all_logits(graphs: Iterable[Graph]) -> bool:
    """Whether each variant of a target's graphs has one with the logits of every new token."""
    of_all = of_model(graphs)
    return bool(of_all) and all(VERIFY.name in of_variant(of_all, v) for v in {g.variant for g in of_all})


def has_prefix(batch: Batch) -> bool:
    """Whether any sequence has more than its new tokens in the cache."""
    return bool((batch.context_lens > batch.q_lens).any())


def reads_cache(prefill: Graph) -> bool:
    """Whether a prefill graph attends to what earlier calls cached."""
    return TARGETS[prefill.target].prefill_reads_cache


__all__ = [
    "COMPILED",
    "DECODE",
    "DRAFT_DECODE",
    "DRAFT_EXTEND",
    "HIDDEN",
    "LOGITS",
    "MIXED",
    "PREFILL",
    "ROLES",
    "VERIFY",
    "Role",
    "best_variant",
    "can_serve",
    "gives_all_logits",
    "graph_for",
    "has_prefix",
    "of_draft",
    "of_model",
    "of_variant",
    "reads_cache",
]
