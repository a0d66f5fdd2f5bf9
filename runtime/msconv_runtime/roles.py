"""Graph roles: what a compiled graph is for, and which graph runs a batch.

Every Role that this file makes is one; `targets` says which of them a target has graphs for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import ArtifactError
from .targets import TARGETS

if TYPE_CHECKING:
    from .artifact import Graph
    from .paging import Batch

COMPILED = "compiled"  # the variant whose operations are compiled kernels; "" has MindSpore's own
LOGITS = "logits"  # the output that every graph for sampling has


@dataclass(frozen=True)
class Role:
    """`rows` of its outputs: of each sequence's last token [B, ...], or of all new tokens [T, ...].  `outputs`:
    their names, in order.  `network`: the module of msconv.graph that builds it."""

    name: str
    rows: Literal["last", "all"] = "last"
    outputs: tuple[str, ...] = (LOGITS,)
    network: str = "decoder"


PREFILL = Role("prefill")  # any number of new tokens a sequence; on Ascend without a cached prefix
DECODE = Role("decode")  # one new token a sequence; on Ascend any number, after any prefix
VERIFY = Role("verify", rows="all")  # logits of every new token, for drafts
MIXED = Role("mixed")  # any batch: new tokens and prefixes of any length

ROLES = {role.name: role for role in list(vars().values()) if isinstance(role, Role)}


def of_variant(graphs: Iterable[Graph], variant: str) -> dict[str, Graph]:
    """By role: the graphs of a variant."""
    return {g.role: g for g in graphs if g.variant == variant}


def best_variant(graphs: Iterable[Graph]) -> list[Graph]:
    """The graphs of a target that serve where their kernels can be had: compiled ones if there are any."""
    of_all = list(graphs)
    return [g for g in of_all if g.variant == COMPILED] or of_all


def graph_for(graphs: dict[str, Graph], asked: Role, batch: Batch) -> Graph:
    """The graph, of those by role, that answers `asked` for the batch.  Raises ArtifactError if there is none.

    A mixed graph runs every batch.  A prefill graph that attends to new tokens only leaves batches with a cached
    prefix to the decode graph; a decode graph that is slow for few sequences leaves those to the prefill graph.
    """
    role = asked.name
    if asked in (PREFILL, DECODE) and MIXED.name in graphs:
        role = MIXED.name
    elif asked is PREFILL and has_prefix(batch) and not reads_cache(graphs[PREFILL.name]):
        role = DECODE.name
    elif asked is DECODE and len(batch.q_lens) < graphs[DECODE.name].min_sequences:
        role = PREFILL.name
    if role not in graphs:
        raise ArtifactError(f"no {role} graph among {', '.join(sorted(graphs)) or 'none'}.", "Compile again.")
    return graphs[role]


def can_serve(graphs: dict[str, Graph]) -> bool:
    """Whether graphs, by role, can prefill and decode."""
    return MIXED.name in graphs or {PREFILL.name, DECODE.name} <= graphs.keys()


def has_prefix(batch: Batch) -> bool:
    """Whether any sequence has more than its new tokens in the cache."""
    return bool((batch.context_lens > batch.q_lens).any())


def reads_cache(prefill: Graph) -> bool:
    """Whether a prefill graph attends to what earlier calls cached."""
    return TARGETS[prefill.target].prefill_reads_cache
