"""What is run: ragged prefill, decode, chunked prefill on a cached prefix, decode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.roles import DECODE, PREFILL, VERIFY, Role

from .reference import Logits
from .telling import Tell, quietly

DECODE_STEPS = 16
PROMPTS = (1, 5, 16, 17, 33, 70)  # below, at and above page boundaries
EVERY = (3, 40, 1, 2, 20, 9)  # appended at last, where a graph gives the logits of all of them
CHUNKS = (3, 40, 1, 2, 300, 9)  # appended to what is cached by then


class Candidate(Protocol):
    """What is to be proved: sequences in, logits of each last token out, [B, V]."""

    def prefill(self, prompts: list[list[int]]) -> Logits: ...
    def extend(self, tokens: list[list[int]]) -> Logits: ...
    def decode(self, tokens: list[int]) -> Logits: ...


@dataclass(frozen=True)
class Seen:
    """One call of the candidate.  `places` and `rows`: (sequence, position) of each token and each logits row.
    `hidden`: states of each token, where the graphs give them to a draft."""

    phase: str
    places: list[tuple[int, int]]
    rows: list[tuple[int, int]]
    logits: Logits
    probes: dict[str, NDArray[np.float32]]
    hidden: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence: of prompts, of what is appended to them, of what is appended at last with all its
    logits, [] if none is; and how often to decode."""

    prompts: list[int]
    appended: list[int]
    every: list[int]
    steps: int

    @classmethod
    def within(cls, max_positions: int, steps: int, has_all_tokens: bool) -> Lengths:
        """The usual ones, where a model has as many positions, or as many as fit into it."""
        most = min(DECODE_STEPS, max(1, max_positions // 8))
        every = [min(n, max(1, max_positions // 3)) for n in EVERY]
        room = max(1, max_positions - 2 * most - max(every))
        prompts = [min(n, max(1, room // 2)) for n in PROMPTS]
        appended = [min(n, max(1, room - p)) for n, p in zip(CHUNKS, prompts, strict=True)]
        return cls(prompts, appended, every if has_all_tokens else [], min(steps, most))

    @property
    def totals(self) -> list[int]:
        every = self.every or [0] * len(self.prompts)
        both = zip(self.prompts, self.appended, every, strict=True)
        return [p + a + 2 * self.steps + e for p, a, e in both]


@dataclass(frozen=True)
class Call:
    """One call of a candidate, decided beforehand: tokens are drawn, none is the candidate's answer.  `new`: each
    sequence's; `places`: (sequence, position) of each; `rows`: those whose logits come back."""

    phase: str
    role: Role
    begins: bool
    new: list[list[int]]
    places: list[tuple[int, int]]
    rows: list[tuple[int, int]]


def calls_of(name: str, sequences: list[list[int]], lengths: Lengths, has_all_tokens: bool) -> list[Call]:
    """The scenario's calls in their order.  `name`: before the phase's."""
    one = [1] * len(sequences)
    planned = [("prefill", PREFILL, lengths.prompts), *[("decode", DECODE, one)] * lengths.steps]
    planned.append(("prefill on a cached prefix", PREFILL, lengths.appended))
    planned += [("decode after it", DECODE, one)] * lengths.steps
    if lengths.every and has_all_tokens:
        planned.append(("all tokens", VERIFY, lengths.every))
    done = [0] * len(sequences)
    calls: list[Call] = []
    for phase, role, counts in planned:
        new = [s[d : d + n] for s, d, n in zip(sequences, done, counts, strict=True)]
        places = [(i, done[i] + t) for i, n in enumerate(counts) for t in range(n)]
        done = [d + n for d, n in zip(done, counts, strict=True)]
        rows = places if role is VERIFY else [(i, d - 1) for i, d in enumerate(done)]
        calls.append(Call(name + phase, role, not calls, new, places, rows))
    return calls


def play(
    candidate: Candidate, name: str, sequences: list[list[int]], lengths: Lengths, tell: Tell = quietly
) -> Iterator[Seen]:
    """Run a candidate; each of its calls, as soon as it is done.  `name`: before the phase's."""
    calls = calls_of(name, sequences, lengths, getattr(candidate, "has_all_tokens", False))
    for number, call in enumerate(calls):
        tell(f"{name}graphs", number, len(calls))
        logits = _called(candidate, call)
        probes, hidden = dict(getattr(candidate, "probes", {})), getattr(candidate, "hidden", None)
        yield Seen(call.phase, call.places, call.rows, logits, probes, hidden)


def _called(candidate: Candidate, call: Call) -> Logits:
    if call.role is DECODE:
        return candidate.decode([t for (t,) in call.new])
    if call.role is VERIFY:
        logits: Logits = candidate.extend_all(call.new)  # type: ignore[attr-defined]
        return logits
    return candidate.prefill(call.new) if call.begins else candidate.extend(call.new)
