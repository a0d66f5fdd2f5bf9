"""A scenario is drawn, played by a candidate, and judged against the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .comparison import FLOAT32_BOUND, Comparison
from .kept import NOTHING, Kept
from .layers import InLayers, JudgeInLayers, judge_in_layers
from .reference import Reference, Trace
from .scenario import DECODE_STEPS, Candidate, Lengths, calls_of, play
from .telling import Tell, quietly

Further = Callable[[Comparison, list[list[int]], list[NDArray[np.float32]], Lengths], None]
REDRAWS = 6  # of sequences with a tie in routing


def compare(
    candidate: Candidate,
    reference: Reference,
    vocab: int,
    max_positions: int,
    bound: float = FLOAT32_BOUND,
    steps: int = DECODE_STEPS,
    seed: int = 0,
    others: Mapping[str, Callable[[], Candidate]] = MappingProxyType({}),
    tell: Tell = quietly,
    further: Further | None = None,
    kept: Kept = NOTHING,
    judge_apart: JudgeInLayers = judge_in_layers,
) -> Comparison:
    """Run the scenario with random tokens; compare every row of logits, and every norm that the candidate
    shows (`probes`), with the reference's.  Then the same with `others`, by name, as long as nothing is wrong.
    `further`: what else is compared for these sequences, last.  `kept`: what an earlier run had computed, and
    where this one keeps what it does.  `judge_apart`: judges a candidate that can run layer by layer."""
    lengths = Lengths.within(max_positions, steps, getattr(candidate, "has_all_tokens", False))
    sequences, traces = draw(reference, lengths.totals, vocab, np.random.default_rng(seed))
    result = Comparison(bound)

    def judge(one: Candidate, name: str) -> None:
        if isinstance(one, InLayers):
            calls = calls_of(name, sequences, lengths, one.has_all_tokens)
            known = f"candidate {name}".strip()
            judge_apart(result, one, calls, traces, kept, known, partial(tell, f"{name}graphs"))
        else:
            for step in play(one, name, sequences, lengths, tell):
                result.add_step(step, traces)
        result.apart = max(result.apart, getattr(one, "apart", 0.0))

    judge(candidate, "")
    for name, make in others.items():
        if result.ok or result.ok_but_for_ties:
            judge(make(), name + " ")
    if further is not None and (result.ok or result.ok_but_for_ties):
        further(result, sequences, [t.hidden for t in traces], lengths)
    result.closest_routing = closest_judged(traces)
    result.chosen = chosen_judged(traces)
    return result


def closest_judged(traces: list[Trace]) -> float:
    """How close a router came to another choice before any that hung on rounding."""
    return min(float(t.closest[: t.decided].min(initial=np.inf)) for t in traces)


def chosen_judged(traces: list[Trace]) -> dict[int, frozenset[int]]:
    """By layer, the experts that tokens took before any choice that hung on rounding."""
    found: dict[int, set[int]] = {}
    for trace in traces:
        for name, ids in trace.chosen.items():
            found.setdefault(int(name.split(".")[2]), set()).update(ids[: trace.decided].ravel().tolist())
    return {layer: frozenset(ids) for layer, ids in found.items()}


def draw(
    reference: Reference, lengths: list[int], vocab: int, rng: np.random.Generator
) -> tuple[list[list[int]], list[Trace]]:
    """Random sequences and their traces.  One in which a router's choice hangs on rounding is drawn again."""

    def tokens(n: int) -> list[int]:
        return [int(t) for t in rng.integers(0, vocab, n)]

    sequences = [tokens(n) for n in lengths]
    traces = reference.traces(sequences)
    for _ in range(REDRAWS):
        tied = [i for i, t in enumerate(traces) if t.decided < lengths[i]]
        if not tied:
            break
        fresh = [tokens(lengths[i]) for i in tied]
        for i, sequence, trace in zip(tied, fresh, reference.traces(fresh), strict=True):
            if trace.decided > traces[i].decided:
                sequences[i], traces[i] = sequence, trace
    return sequences, traces
