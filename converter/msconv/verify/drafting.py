"""The proof of a draft's graphs: prompts, single tokens, more after a cached prefix, and tokens after its own
hidden states; against the reference of that layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.roles import DRAFT_DECODE, DRAFT_EXTEND, HIDDEN, LOGITS, Role

from .compare import REDRAWS
from .comparison import Comparison
from .reference import ROUTER_TIE, Logits, Reference
from .scenario import Lengths
from .telling import Tell, quietly

if TYPE_CHECKING:
    from .lockstep import Lockstep

STEPS = 2
MOST_APPENDED = 20

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class DraftTrace:
    """One sequence: logits [T, V], hidden states [T, hidden] after the draft's own norm, and how far the router
    was from choosing other experts [T]."""

    logits: Logits
    hidden: NDArray[np.float32]
    closest: NDArray[np.float32]

    @property
    def decided(self) -> int:
        """Positions before the first whose routing hangs on rounding."""
        tied = np.flatnonzero(self.closest < ROUTER_TIE)
        return int(tied[0]) if len(tied) else len(self.closest)


class LayerReference(Protocol):
    """A layer that drafts, of a `reference` of its model.  `hidden[i][j]`: of the position before that of
    `tokens[i][j]`."""

    reference: Reference

    def run(self, tokens: list[list[int]], hidden: list[Rows]) -> list[DraftTrace]: ...


class DraftCandidate(Protocol):
    """What is to be proved: tokens and hidden states in; logits of each last token, hidden states of all out."""

    def begin(self, count: int) -> None: ...
    def run(self, asked: Role, tokens: list[list[int]], hidden: Rows | None = None) -> Mapping[str, Rows]: ...


@dataclass(frozen=True)
class Drafting:
    """A layer's reference, and its candidates by variant: whoever runs them here, and the interpreter."""

    reference: LayerReference
    candidates: Mapping[str, Callable[[], DraftCandidate]]
    interpreted: Mapping[str, Callable[[], Lockstep]]


@dataclass(frozen=True)
class Case:
    """Sequences as a draft sees them: each token with the hidden states of the position before it.  `traces`: the
    reference's, `chained` times after its own hidden states at the end."""

    tokens: list[list[int]]
    hidden: list[Rows]
    traces: list[DraftTrace]
    counts: list[tuple[Role, list[int]]]
    chained: int


@dataclass(frozen=True)
class Step:
    """One call of a candidate.  `spans`: which tokens of each sequence; `given` [T, ..]: the hidden states beside
    them."""

    phase: str
    spans: list[slice]
    given: Rows
    outputs: Mapping[str, Rows]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Sequence and position of each token, in the call's order."""
        return [(i, position) for i, span in enumerate(self.spans) for position in range(span.start, span.stop)]


def compare_drafts(
    result: Comparison,
    sequences: list[list[int]],
    hidden: list[Rows],
    lengths: Lengths,
    drafting: Drafting,
    tell: Tell = quietly,
) -> None:
    """Add to `result` what each candidate does for the sequences, of which `hidden` are the model's states."""
    case = case_of(drafting.reference, sequences, hidden, lengths)
    for number, (name, make) in enumerate(drafting.candidates.items()):
        if not result.ok and not result.ok_but_for_ties:
            return
        tell("drafts", number, len(drafting.candidates))
        candidate = make()
        judge(result, case, run(case, candidate, f"{name} draft".strip()))
        result.apart = max(result.apart, getattr(candidate, "apart", 0.0))


def diverging(case: Case, drafting: Drafting) -> dict[str, tuple[Rows, Rows]]:
    """By candidate: the reference's logits and its own, where each rounds by itself."""
    found = {}
    for name, make in drafting.candidates.items():
        rows: list[tuple[Rows, Rows]] = []
        judge(Comparison(float("inf")), case, run(case, make(), name), rows)
        found[name] = (np.stack([wanted for wanted, _ in rows]), np.stack([row for _, row in rows]))
    return found


def case_of(reference: LayerReference, sequences: list[list[int]], hidden: list[Rows], lengths: Lengths) -> Case:
    """What a draft is asked of the model's sequences, with the reference's answers."""
    room = [len(s) - 1 - p for s, p in zip(sequences, lengths.prompts, strict=True)]
    steps = min(STEPS, min(room) // 3)
    appended = [max(1, min(MOST_APPENDED, r - 2 * steps)) for r in room]
    one = [1] * len(sequences)
    counts = [(DRAFT_EXTEND, lengths.prompts), *[(DRAFT_DECODE, one)] * steps, (DRAFT_EXTEND, appended)]
    ends = [p + steps + a for p, a in zip(lengths.prompts, appended, strict=True)]
    tokens = [s[1 : end + 1] for s, end in zip(sequences, ends, strict=True)]
    given = [h[:end] for h, end in zip(hidden, ends, strict=True)]
    tokens, traces = _settled(reference, tokens, given)
    for step in range(steps):  # from here on, a token follows what the layer itself made of the one before
        given = [np.concatenate([h, t.hidden[-1:]]) for h, t in zip(given, traces, strict=True)]
        tokens = [[*t, s[end + step + 1]] for t, s, end in zip(tokens, sequences, ends, strict=True)]
        traces = reference.run(tokens, given)
    return Case(tokens, given, traces, [*counts, *[(DRAFT_DECODE, one)] * steps], steps)


def _settled(
    reference: LayerReference, tokens: list[list[int]], hidden: list[Rows]
) -> tuple[list[list[int]], list[DraftTrace]]:
    """The sequences and their traces; one in which the router's choice hangs on rounding, in another order of its
    tokens: any token may follow any hidden states."""
    rng = np.random.default_rng(0)
    traces = reference.run(tokens, hidden)
    for _ in range(REDRAWS):
        tied = [i for i, t in enumerate(traces) if t.decided < len(tokens[i])]
        if not tied:
            break
        fresh = [[int(t) for t in rng.permutation(tokens[i])] for i in tied]
        for i, order, trace in zip(tied, fresh, reference.run(fresh, [hidden[i] for i in tied]), strict=True):
            if trace.decided > traces[i].decided:
                tokens[i], traces[i] = order, trace
    return tokens, traces


def run(case: Case, candidate: DraftCandidate, name: str) -> Iterator[Step]:
    """Each call of a candidate, as soon as it is done."""
    candidate.begin(len(case.tokens))
    done = [0] * len(case.tokens)
    last: list[Rows] = []
    for number, (role, counts) in enumerate(case.counts):
        spans = [slice(d, d + n) for d, n in zip(done, counts, strict=True)]
        new = [t[span] for t, span in zip(case.tokens, spans, strict=True)]
        is_chained = number >= len(case.counts) - case.chained
        rows = last if is_chained else [h[span] for h, span in zip(case.hidden, spans, strict=True)]
        phase = f"{name} {'extend' if role is DRAFT_EXTEND else 'decode'}"
        phase += (
            " after itself" if is_chained else " on a cached prefix" if number and role is DRAFT_EXTEND else ""
        )
        given = np.concatenate(rows)
        outputs = candidate.run(role, new, given)
        done = [span.stop for span in spans]
        last = [outputs[HIDDEN][end - 1 : end] for end in np.cumsum(counts)]
        yield Step(phase, spans, given, outputs)


def judge(
    result: Comparison, case: Case, steps: Iterable[Step], seen: list[tuple[Rows, Rows]] | None = None
) -> None:
    """Add what a candidate does to `result`, and to `seen` the reference's rows of logits with its own."""
    for step in steps:
        phase, outputs = step.phase, step.outputs
        both = list(zip(case.traces, step.spans, strict=True))
        result.add_hidden(
            phase,
            outputs[HIDDEN],
            np.concatenate([t.hidden[span] for t, span in both]),
            np.concatenate([np.arange(span.start, span.stop) < t.decided for t, span in both]),
        )
        if len(outputs[LOGITS]) != len(both):
            result.fail(f"{phase}: {len(outputs[LOGITS])} rows of logits for {len(both)} sequences")
            return
        for i, (row, (trace, span)) in enumerate(zip(outputs[LOGITS], both, strict=True)):
            position = span.stop - 1
            if position < trace.decided:
                if seen is not None:
                    seen.append((trace.logits[position], row))
                result.add(phase, f"sequence {i}, position {position}", row, trace.logits[position])
            else:
                result.undecided += 1
        if not result.max_abs_logit_error < result.bound:
            result.fail(f"the draft's logits, seen in {phase}")
            return
    rows = sum(len(t.closest) for t in case.traces)
    if 2 * sum(t.decided for t in case.traces) < rows:
        result.fail("draft: most choices of its router hang on rounding")
