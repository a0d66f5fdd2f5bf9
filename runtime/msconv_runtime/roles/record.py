"""What a graph role is: what a compiled graph is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LOGITS = "logits"  # the vocabulary's scores
HIDDEN = "hidden"  # what the head reads: the last norm's output


@dataclass(frozen=True)
class Role:
    """`new_tokens`: how many of each sequence the graph must take, one or any number.  `begins`: its sequences are
    new, unless the target's prefill graphs read what earlier calls cached; else they may have any prefix.

    `outputs`: their names, in order.  `rows` of them: of each sequence's last token [B, ...], or of all new tokens
    [T, ...].  `network`: the module of msconv.graph that builds it.
    """

    name: str
    new_tokens: Literal["one", "any"] = "any"
    begins: bool = False
    rows: Literal["last", "all"] = "last"
    outputs: tuple[str, ...] = (LOGITS,)
    network: str = "decoder"
