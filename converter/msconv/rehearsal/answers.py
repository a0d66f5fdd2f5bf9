"""The server's answers against transformers on the source checkpoint, rounded as the server binds its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from msconv_runtime.artifact import Manifest

from ..verify.reference import Reference
from .replay import Row, Rows
from .scenario import Conversation


@dataclass
class Answers:
    """`ties`: tokens whose logit is the best but for less than twice the bound.  `undecided`: tokens after a
    router's choice that hung on rounding.  `error`: largest difference of logits to transformers'."""

    tokens: int = 0
    equal: int = 0
    ties: int = 0
    undecided: int = 0
    error: float = 0.0
    problems: list[str] = field(default_factory=list)


class Expected:
    """What transformers computes after each token of each answer."""

    def __init__(self, conversations: list[Conversation], reference: Reference, complete: bool = True) -> None:
        """`complete`: nothing else was asked, so that any other sequence is a problem."""
        self.conversations, self.bound, self.complete = conversations, float("inf"), complete
        self.answers = Answers()
        self._rows: dict[tuple[int, ...], Rows] = {}
        self._asked = False
        for c in conversations:
            (trace,) = reference.traces([c.tokens])
            for count in range(len(c.prompt), min(len(c.tokens), trace.decided) + 1):
                self._rows[tuple(c.tokens[:count])] = trace.logits[count - 1]

    @property
    def largest(self) -> float:
        """Of all logits."""
        return max((float(np.abs(row).max()) for row in self._rows.values()), default=0.0)

    def judge(self, bound: float) -> None:
        """Compare the answers' tokens with the best of transformers' logits.  `bound`: of logits, from now on."""
        self.bound = bound
        for conversation in self.conversations:
            self._judge(conversation)

    def begin_copy(self) -> None:
        """The calls that follow are those of a process that has just started."""
        self._asked = False

    def _judge(self, conversation: Conversation) -> None:
        told = False
        for k, token in enumerate(conversation.answer):
            logits = self._rows.get(tuple(conversation.tokens[: len(conversation.prompt) + k]))
            if logits is None:
                self.answers.undecided += len(conversation.answer) - k
                return
            lead = float(logits.max() - logits[token])
            self.answers.tokens += 1
            self.answers.equal += lead == 0
            self.answers.ties += 0 < lead <= 2 * self.bound
            if lead > 2 * self.bound and not told:
                told = True
                self.answers.problems.append(
                    f"request {conversation.name!r}: token {k} of the answer is {token}, transformers' is "
                    f"{int(logits.argmax())}, whose logit is {lead:.3g} higher"
                )

    def compare(self, where: str, rows: list[Row]) -> None:
        """Logits of one call.  A sequence that nobody asked for is a problem, but for what the server asks itself
        before it is ready."""
        for row in rows:
            expected = self._rows.get(row.tokens)
            self._asked = self._asked or expected is not None
            if expected is not None:
                error = float(np.abs(row.logits.astype(np.float64) - expected).max())
                error = error if np.isfinite(error) else float("inf")
                self.answers.error = max(self.answers.error, error)
                if error >= self.bound:
                    self.answers.problems.append(
                        f"{where}: logits after {len(row.tokens)} tokens differ from transformers' by {error:.2e} "
                        f"(bound {self.bound:.0e})"
                    )
            elif self.complete and self._asked and not self._is_known(list(row.tokens)):
                self.answers.problems.append(
                    f"{where}: a sequence of {len(row.tokens)} tokens that begins {list(row.tokens[:8])} belongs "
                    "to no request"
                )

    def _is_known(self, tokens: list[int]) -> bool:
        """Part of a conversation, or beyond what has come of one that was aborted."""
        return any(
            c.tokens[: len(tokens)] == tokens or (not c.whole and tokens[: len(c.tokens)] == c.tokens)
            for c in self.conversations
        )


def bound_manifest(manifest: Manifest, target: str) -> Manifest:
    """The manifest with the types in which a server binds the weights: what the reference rounds to."""
    weights = manifest.weights
    assert weights is not None
    declared = {p.name: p.dtype for g in manifest.graphs_for(target) for p in g.parameters}
    tensors = [msgspec.structs.replace(t, dtype=declared.get(t.name, t.dtype)) for t in weights.tensors]
    halves = [d for d in declared.values() if d in ("bfloat16", "float16")]
    dtype = halves[0] if halves else weights.dtype
    return msgspec.structs.replace(
        manifest, weights=msgspec.structs.replace(weights, dtype=dtype, tensors=tensors)
    )


def make_reference(source: Path, manifest: Manifest, target: str) -> Reference:
    """Raises VerificationFailed if the source is another model's."""
    return Reference(source, manifest, bound=bound_manifest(manifest, target))
