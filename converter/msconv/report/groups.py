"""Which group of tensors a name belongs to, for people who want to see where memory goes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..layout.constants import RANK_CONSTANTS
from ..layout.names import fold

GROUPS = {  # the first that matches
    "embedding": r"model\.embed_tokens\.",
    "head": r"lm_head\.",
    "norms": r".*norm\.(weight|bias)$",
    "attention": r".*\.self_attn\.",
    "experts": r".*\.mlp\.experts\.",
    "shared experts": r".*\.mlp\.shared_experts\.",
    "router": r".*\.mlp\.gate\.",
    "dense MLP": r".*\.mlp\.",
    "rank constants": "|".join(RANK_CONSTANTS) + "$",
    "draft's input": r".*\.eh_proj\.",
    "other": "",
}
KV_CACHE = "KV cache"
ORDER = (
    "embedding",
    "attention",
    "dense MLP",
    "experts",
    "shared experts",
    "router",
    "head",
    "norms",
    "draft's input",
    "rank constants",
    "other",
    KV_CACHE,
)


def group_of(name: str) -> str:
    """The group of a weight, by its name in the artifact."""
    return next(group for group, pattern in GROUPS.items() if re.match(pattern, name))


def folded(names: Iterable[str]) -> list[dict[str, str | int]]:
    """Names folded over layers, and how many each stands for."""
    return [{"name": name, "tensors": count} for name, count in fold(names)]
