"""What is run and how it is judged: ragged prefill, decode, chunked prefill on a cached prefix, decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .reference import Logits, Reference

FLOAT32_BOUND = 1e-4  # float32 sums in another order; measured 1e-5 on random models, a fault is 1e-2 and up
DECODE_STEPS = 16
PROMPTS = (1, 5, 16, 17, 33, 70)  # below, at and above page boundaries
CHUNKS = (3, 40, 1, 2, 300, 9)  # appended to what is cached by then


class Candidate(Protocol):
    """What is to be proved: sequences in, logits of each last token out, [B, V]."""

    def prefill(self, prompts: list[list[int]]) -> Logits: ...
    def extend(self, tokens: list[list[int]]) -> Logits: ...
    def decode(self, tokens: list[int]) -> Logits: ...


@dataclass
class Comparison:
    """How far apart candidate and reference are.  A row whose two best reference logits are closer than
    twice the bound has no argmax to agree on: it is counted in `ties` and left out of `argmax_agreement`."""

    bound: float
    max_abs_logit_error: float = 0.0
    agreeing: int = 0
    decided: int = 0
    ties: int = 0
    worst: str = ""
    by_phase: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.decided + self.ties

    @property
    def argmax_agreement(self) -> float:
        return self.agreeing / self.decided if self.decided else 1.0

    @property
    def ok(self) -> bool:
        return self.rows > 0 and self.max_abs_logit_error < self.bound and self.argmax_agreement == 1.0

    def add(self, phase: str, where: str, found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Compare one row of logits [V]."""
        if found.shape != expected.shape:
            error = float("inf")
        else:
            error = float(np.abs(found.astype(np.float64) - expected).max())
            if not np.isfinite(error):
                error = float("inf")
        self.by_phase[phase] = max(error, self.by_phase.get(phase, 0.0))
        if error > self.max_abs_logit_error or not self.worst:
            self.max_abs_logit_error, self.worst = max(error, self.max_abs_logit_error), f"{phase}, {where}"
        best = np.sort(expected)[-2:]
        if len(best) == 2 and best[1] - best[0] <= 2 * self.bound:
            self.ties += 1
            return
        self.decided += 1
        self.agreeing += int(found.shape == expected.shape and found.argmax() == expected.argmax())


def compare(
    candidate: Candidate, reference: Reference, vocab: int, max_positions: int, seed: int = 0
) -> Comparison:
    """Run the scenario with random tokens and compare every row of logits with the reference's."""
    rng = np.random.default_rng(seed)

    def tokens(n: int) -> list[int]:
        return [int(t) for t in rng.integers(0, vocab, n)]

    room = max(1, max_positions - 2 * DECODE_STEPS)
    prompts = [tokens(min(n, max(1, room // 2))) for n in PROMPTS]
    appended = [tokens(min(n, max(1, room - len(p)))) for n, p in zip(CHUNKS, prompts, strict=True)]
    sequences = [list(p) for p in prompts]
    rows: list[tuple[str, int, int, NDArray[np.float32]]] = []  # phase, sequence, position, logits

    def note(phase: str, logits: Logits) -> None:
        for i, row in enumerate(logits):
            rows.append((phase, i, len(sequences[i]) - 1, row))

    def decode(phase: str) -> None:
        for _ in range(DECODE_STEPS):
            step = tokens(len(sequences))
            for sequence, token in zip(sequences, step, strict=True):
                sequence.append(token)
            note(phase, candidate.decode(step))

    note("prefill", candidate.prefill(prompts))
    decode("decode")
    for sequence, new in zip(sequences, appended, strict=True):
        sequence += new
    note("prefill on a cached prefix", candidate.extend(appended))
    decode("decode after it")

    result = Comparison(FLOAT32_BOUND)
    expected = [reference.logits(s) for s in sequences]
    for phase, i, position, row in rows:
        result.add(phase, f"sequence {i}, position {position}", row, expected[i][position])
    return result
