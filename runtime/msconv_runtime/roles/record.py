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
    [T, ...].  `network`: the module of msconv.graph that builds it; a draft's is its kind's.

    `is_draft`: it takes hidden states beside tokens, has caches of its own, and gives logits as `rows` says and
    hidden states of all new tokens.
    """

    name: str
    new_tokens: Literal["one", "any"] = "any"
    begins: bool = False
    rows: Literal["last", "all"] = "last"
    outputs: tuple[str, ...] = (LOGITS,)
    network: str = "decoder"
    is_draft: bool = False

    def given(self, has_draft: bool) -> tuple[str, ...]:
        """The outputs of its graph.  Where an artifact has a draft, graphs that give logits also give hidden
        states of every new token, [T, ...], whatever the rows of the logits."""
        return (*self.outputs, HIDDEN) if has_draft and self.outputs == (LOGITS,) else self.outputs

    def is_of_all(self, output: str) -> bool:
        """Whether an output has a row for every new token."""
        return self.rows == "all" or (output == HIDDEN and (self.is_draft or HIDDEN not in self.outputs))
