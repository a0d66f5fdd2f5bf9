"""The server's answers against transformers on the source checkpoint, rounded as the server binds its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from msconv_runtime.artifact import Manifest

from ..verify.int8.drift import divergence
from ..verify.int8.reference import QuantisedReference
from ..verify.reference import Reference
from ..verify.subject import is_int8
from .replay import Row, Rows
from .scenario import Conversation

KEEP_BYTES = 1 << 30  # of logits of prompts: of a large vocabulary only those of the answers are kept
Tokens = tuple[int, ...]


@dataclass
class Answers:
    """`ties`: tokens whose logit is the best but for less than twice the bound.  `undecided`: tokens after a
    router's choice that hung on rounding.  `error`: largest difference of logits to transformers'.  `logprobs`: of
    prompts, that were compared.  `divergence`: of each call's logits from the reference's, where both round
    activations to int8 by themselves, so that no bound of logits holds."""

    tokens: int = 0
    equal: int = 0
    ties: int = 0
    undecided: int = 0
    error: float = 0.0
    logprobs: int = 0
    divergence: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def kl(self) -> float | None:
        """Mean divergence in nats; None where logits have a bound."""
        return float(np.mean(self.divergence)) if self.divergence else None


class Expected:
    """What transformers computes after each token of each conversation, and what the server made of it."""

    def __init__(
        self,
        conversations: list[Conversation],
        reference: Reference,
        vocab: int,
        complete: bool,
        drafts: int = 0,
    ) -> None:
        """`complete`: nothing else was asked and all was answered: another sequence, or a missing one, is a
        problem.  `drafts`: so many tokens at most are guessed and verified in one call; what follows a wrong guess
        belongs to no request."""
        self.conversations, self.complete, self.bound = conversations, complete, math.inf
        self.drafts = drafts
        self.answers = Answers()
        self.rounds_by_itself = isinstance(reference, QuantisedReference)
        self.asked = False  # whether the calls are past what the server asks itself at its start
        self._rows: dict[Tokens, Rows] = {}
        self._next: dict[Tokens, int] = {}  # the token that was answered after these
        self._seen: set[Tokens] = set()
        all_bytes = sum(len(c.tokens) for c in conversations) * vocab * 4
        for c in conversations:
            first = 1 if all_bytes <= KEEP_BYTES else len(c.prompt)
            (trace,) = reference.traces([c.tokens])
            for count in range(first, min(len(c.tokens), trace.decided) + 1):
                self._rows[tuple(c.tokens[:count])] = trace.logits[count - 1]
            for k, token in enumerate(c.answer):
                self._next[tuple(c.tokens[: len(c.prompt) + k])] = token

    @property
    def largest(self) -> float:
        """The largest absolute value among transformers' logits."""
        return max((float(np.abs(row).max()) for row in self._rows.values()), default=0.0)

    def judge(self, bound: float) -> None:
        """Compare the answers' tokens with the best of transformers' logits.  `bound`: of logits, from now on;
        where it is infinite, tokens are only counted."""
        self.bound = bound
        for conversation in self.conversations:
            self._judge(conversation)
            self._judge_logprobs(conversation)

    def begin_copy(self) -> None:
        """The calls that follow are those of a process that has just started."""
        self.asked = False

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
            self.answers.ties += math.isfinite(self.bound) and 0 < lead <= 2 * self.bound
            if lead > 2 * self.bound and not told:
                told = True
                self.answers.problems.append(
                    f"request {conversation.name!r}: token {k} of the answer is {token}, transformers' is "
                    f"{int(logits.argmax())}, whose logit is {lead:.3g} higher"
                )

    def _judge_logprobs(self, conversation: Conversation) -> None:
        """The prompt's log probabilities.  Those of a logit and of the sum may both be off by the bound."""
        for position, value in enumerate(conversation.logprobs, 1):
            row = self._rows.get(tuple(conversation.tokens[:position]))
            if row is None or position >= len(conversation.prompt):
                return
            wide = row.astype(np.float64)
            largest = wide.max()
            expected = float(wide[conversation.prompt[position]] - largest - np.log(np.exp(wide - largest).sum()))
            self.answers.logprobs += 1
            if not abs(value - expected) <= 2 * self.bound:
                self.answers.problems.append(
                    f"request {conversation.name!r}: the log probability of token {position} of the prompt is "
                    f"{value:.6g}, by transformers {expected:.6g}"
                )
                return

    def compare(self, where: str, rows: list[Row]) -> None:
        """Compare the logits of one call with transformers', and with the token that was answered.  A sequence
        that nobody asked for is a problem, but for what the server asks itself before it is ready."""
        for row in rows:
            expected = self._rows.get(row.tokens)
            self._seen.add(row.tokens)
            self.asked = self.asked or row.tokens in self._next
            if expected is not None:
                self._compare_logits(where, row, expected)
            elif self.complete and self.asked and not self._is_known(row):
                self.answers.problems.append(
                    f"{where}: a sequence of {len(row.tokens)} tokens that begins {list(row.tokens[:8])} belongs "
                    "to no request"
                )
            answered = self._next.get(row.tokens)
            if answered is not None and row.logits[answered] < row.logits.max():
                self.answers.problems.append(
                    f"{where}: the best token after {len(row.tokens)} tokens is {int(row.logits.argmax())} by its "
                    f"logits; the answer has {answered}"
                )

    def _compare_logits(self, where: str, row: Row, expected: Rows) -> None:
        error = float(np.abs(row.logits.astype(np.float64) - expected).max())
        error = error if np.isfinite(error) else math.inf
        if self.rounds_by_itself:
            self.answers.divergence.append(divergence(expected[None], row.logits[None]))
        self.answers.error = max(self.answers.error, error)
        if error >= self.bound:
            self.answers.problems.append(
                f"{where}: logits after {len(row.tokens)} tokens differ from transformers' by {error:.2e} "
                f"(bound {self.bound:.0e})"
            )

    def finish(self) -> None:
        """After all calls: each token of an answer must have come from one of them."""
        if not self.complete:
            return
        for c in self.conversations:
            for k in range(len(c.answer)):
                if tuple(c.tokens[: len(c.prompt) + k]) not in self._seen:
                    self.answers.problems.append(f"request {c.name!r}: token {k} of the answer comes from no call")
                    break

    def _is_known(self, row: Row) -> bool:
        """Whether its tokens are part of a conversation, or guesses, or beyond what has come of one that was
        aborted or ended among drafts."""
        tokens = list(row.tokens)
        if self.drafts and row.new:
            return True  # by its first token the call is judged
        return any(
            c.tokens[: len(tokens)] == tokens
            or (
                tokens[: len(c.tokens)] == c.tokens and (not c.whole or len(tokens) <= len(c.tokens) + self.drafts)
            )
            for c in self.conversations
        )


def bound_manifest(manifest: Manifest, target: str) -> Manifest:
    """The manifest with the types in which a server binds the weights: what the reference rounds to."""
    weights = manifest.weights
    assert weights is not None
    declared = {p.name: p.dtype for g in manifest.graphs_for(target) for p in g.reads}
    tensors = [msgspec.structs.replace(t, dtype=declared.get(t.name, t.dtype)) for t in weights.tensors]
    halves = [d for d in declared.values() if d in ("bfloat16", "float16")]
    dtype = halves[0] if halves else weights.dtype
    return msgspec.structs.replace(
        manifest, weights=msgspec.structs.replace(weights, dtype=dtype, tensors=tensors)
    )


def make_reference(source: Path, manifest: Manifest, target: str) -> Reference:
    """The reference that rounds as the server does.  Raises VerificationFailed if it is of another model."""
    make = QuantisedReference if manifest.weights and is_int8(manifest.weights) else Reference
    return make(source, manifest, bound=bound_manifest(manifest, target))
