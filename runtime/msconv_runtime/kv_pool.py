"""KV pools: the bytes of a token, which pages a target's graphs can share, and how large a pool is by default."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .artifact import Artifact, Graph, GraphInput
from .dtypes import DTYPES
from .roles import of_model
from .targets import Target

POOL_BYTES = 4 << 30  # most memory the KV pools of all ranks take by default, in a machine's own memory
POOL_TOKENS = (4096, 131072)  # least and most


@dataclass(frozen=True)
class Pool:
    """`page`: slots a page.  `tokens`: 0 where the server fills its device's memory.  `dtype`: of its elements."""

    page: int
    tokens: int
    dtype: str


def token_bytes(caches: Iterable[GraphInput]) -> int:
    """Bytes of one token on one rank, in all caches of a graph."""
    return sum(DTYPES[c.dtype].nbytes * math.prod(n or 1 for n in c.shape[2:]) for c in caches)


def weight_bytes(graphs: Iterable[Graph]) -> int:
    """Bytes of what these graphs read on one rank, in the types that they take."""
    sizes = {p.name: math.prod(p.shape) * DTYPES[p.dtype].nbytes for g in graphs for p in g.reads}
    return sum(sizes.values())


def widest_cache(artifact: Artifact, target: Target) -> GraphInput:
    """The cache whose rows are longest: it bounds the page.  Raises ArtifactError as `Artifact.graphs` does."""
    return max(_caches(artifact, target), key=_width)


def page_problem(target: Target, cache: GraphInput, page: int) -> str:
    """Why graphs that take `cache` could not take pages of so many slots, or ""."""
    multiple, most = target.paging.multiple, target.paging.elements
    if page >= multiple and page % multiple == 0 and (not most or page * _width(cache) <= most):
        return ""
    return (
        f"Ascend's attention takes multiples of {multiple}, and at most {most} elements of a head in a page; "
        f"a head has {cache.shape[-1]}"
    )


def usual_pool(artifact: Artifact, target: Target) -> Pool:
    """What a server makes unless it is told otherwise: the best page that fits; in a machine's own memory, tokens
    within POOL_BYTES, in whole pages."""
    caches, pages = _caches(artifact, target), target.paging.pages
    cache = widest_cache(artifact, target)
    page = next((p for p in pages if not page_problem(target, cache, p)), pages[-1])
    if not target.device.is_host:
        return Pool(page, 0, cache.dtype)
    least, most = POOL_TOKENS
    fitting = POOL_BYTES // max(1, artifact.tp * token_bytes(caches))
    return Pool(page, max(least, min(most, fitting)) // page * page, cache.dtype)


def _caches(artifact: Artifact, target: Target) -> list[GraphInput]:
    """The model's own; of what is a draft only, those."""
    graphs = artifact.graphs(target.name)
    return (of_model(graphs) or graphs)[0].caches


def _width(cache: GraphInput) -> int:
    return cache.shape[-1] or 1
