"""How close a router was to choosing other experts, and what a comparison makes of ties."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msconv.families.config import Moe
from msconv.verify.compare import compare
from msconv.verify.comparison import Comparison
from msconv.verify.reference import ROUTER_TIE, Logits, Trace
from msconv.verify.routing import closeness

UNIT = 1 / 64  # scores are multiples of it: sums and differences are exact


def moe(experts: int, top_k: int, groups: int = 1, top_groups: int = 1, scoring: Any = "softmax") -> Moe:
    return Moe((True,), experts, top_k, 8, scoring=scoring, groups=groups, top_groups=top_groups)


def chosen(scores: list[float], m: Moe) -> tuple[set[int], set[int]]:
    """Groups and experts, by definition: the best groups by the sum of their best two, then the best experts."""
    size = m.experts // m.groups
    members = [range(g * size, (g + 1) * size) for g in range(m.groups)]
    sums = [sum(sorted((scores[e] for e in group), reverse=True)[:2]) for group in members]
    kept = set(sorted(range(m.groups), key=lambda g: -sums[g])[: m.top_groups])
    if m.scoring == "softmax" or m.top_groups == m.groups:
        kept = set(range(m.groups))
    able = [e for g in sorted(kept) for e in members[g]]
    return kept, set(sorted(able, key=lambda e: -scores[e])[: m.top_k])


def smallest_change(scores: list[float], m: Moe) -> float:
    """Twice the least by which all scores may move until something else can be chosen: each of two experts may
    move towards the other, and so may each of four, where two groups of two are weighed."""
    size = m.experts // m.groups
    kept, experts = chosen(scores, m)
    able = [e for g in kept for e in range(g * size, (g + 1) * size)]
    gaps = [scores[a] - scores[b] for a in experts for b in able if b not in experts]
    if len(kept) < m.groups:
        sums = [sum(sorted(scores[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(m.groups)]
        gaps += [(sums[a] - sums[b]) / 2 for a in kept for b in set(range(m.groups)) - kept]
    return min(gaps, default=float("inf"))


def measured(scores: list[float], m: Moe) -> float:
    """`closeness` of one token; of sigmoid routing the bias brings each expert to its score."""
    wanted = torch.tensor([scores], dtype=torch.float64)
    if m.scoring == "softmax":
        return float(closeness(wanted, m, None)[0])
    logits = torch.linspace(-2, 2, m.experts, dtype=torch.float64)[None]
    return float(closeness(logits, m, (wanted - logits.sigmoid())[0])[0])


@st.composite
def routers(draw: st.DrawFn) -> tuple[Moe, list[float]]:
    kind = draw(st.sampled_from(["softmax", "sigmoid"]))
    groups = draw(st.sampled_from([1, 2, 3, 4])) if kind == "sigmoid" else 1
    size = draw(st.integers(2, 5))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, size * top_groups))
    scores = draw(st.lists(st.integers(-64, 64), min_size=groups * size, max_size=groups * size))
    return moe(groups * size, top_k, groups, top_groups, kind), [s * UNIT for s in scores]


@given(routers(), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_scores_that_move_by_less_than_half_the_closeness_choose_the_same_experts(
    router: tuple[Moe, list[float]], random: Any
) -> None:
    m, scores = router
    close = min(measured(scores, m), 1e3)
    if close < UNIT / 2:
        return  # tied: anything may be chosen
    before = chosen(scores, m)[1]
    step = close * 0.499
    moves = [[random.uniform(-step, step) for _ in scores], [random.choice((-step, step)) for _ in scores]]
    moves.append([-step if e in before else step for e in range(m.experts)])  # the worst that can happen to them
    kept = chosen(scores, m)[0]
    size = m.experts // m.groups
    moves.append([-step if e // size in kept else step for e in range(m.experts)])  # and to their groups
    for move in moves:
        assert chosen([s + d for s, d in zip(scores, move, strict=True)], m)[1] == before


@given(routers())
@settings(max_examples=300, deadline=None)
def test_closeness_is_the_distance_to_the_next_choice(router: tuple[Moe, list[float]]) -> None:
    m, scores = router
    expected, found = smallest_change(scores, m), measured(scores, m)
    assert found == expected or abs(found - expected) < 1e-9


def test_groups_that_are_weighed_by_two_scores_are_twice_as_close() -> None:
    """Sums 1.5 and 1.25: an eighth of a quarter more on each of four scores, and the groups change places."""
    m = moe(4, 1, 2, 1, "sigmoid")
    assert chosen([1.0, 0.5, 0.75, 0.5], m)[0] == {0}
    assert chosen([1.0 - 0.07, 0.5 - 0.07, 0.75 + 0.07, 0.5 + 0.07], m)[0] == {1}
    assert measured([1.0, 0.5, 0.75, 0.5], m) / 2 <= 0.07


@pytest.mark.parametrize(
    ("m", "scores"),
    [
        (moe(4, 2), [0.1, 0.5, 0.3, 0.3]),
        (moe(4, 2, scoring="sigmoid"), [0.1, 0.5, 0.3, 0.3]),
        (moe(6, 1, 3, 1, "sigmoid"), [0.9, 0.0, 0.5, 0.4, 0.8, 0.1]),  # two groups have the same sum
    ],
)
def test_equal_scores_at_the_edge_are_no_distance_apart(m: Moe, scores: list[float]) -> None:
    assert measured(scores, m) < 1e-12


@pytest.mark.parametrize("m", [moe(4, 2), moe(4, 2, 2, 2, "sigmoid")])
def test_equal_scores_away_from_the_edge_are_no_tie(m: Moe) -> None:
    assert measured([0.5, 0.5, 0.1, 0.1], m) == pytest.approx(0.4)


def test_where_all_experts_are_taken_nothing_is_close() -> None:
    assert measured([0.3, 0.3, 0.1], moe(3, 3)) == float("inf")
    assert measured([0.3, 0.3, 0.1, 0.2], moe(4, 4, 2, 2, "sigmoid")) == float("inf")


def test_a_group_that_is_dropped_does_not_make_its_experts_close() -> None:
    """Experts 1 and 4 are 0.02 apart, but 4 is in a group that is not looked at; its group is 0.18 behind."""
    m = moe(6, 2, 2, 1, "sigmoid")
    assert measured([0.9, 0.6, 0.1, 0.1, 0.62, 0.52], m) == pytest.approx((1.5 - 1.14) / 2)


def test_each_token_has_its_own() -> None:
    rows = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.2, 0.2], [9.0, -9.0, 0.0]])
    assert closeness(rows, moe(3, 1), None).tolist() == pytest.approx([0.2, 0.0, 9.0])


# What a comparison makes of it.
VOCAB = 11


@dataclass
class Told:
    """A reference that says where routing was close: from position `tied` of a sequence on."""

    tied: dict[int, int]  # sequence -> first position with a tie
    logits: bool = True
    redrawn: int = 0

    def traces(self, sequences: list[list[int]]) -> list[Trace]:
        if len(sequences) < 6:
            self.redrawn += 1
        numbers = range(6) if len(sequences) == 6 else sorted(self.tied)
        return [self._trace(i, s) for i, s in zip(numbers, sequences, strict=True)]

    def _trace(self, i: int, sequence: list[int]) -> Trace:
        closest = np.full(len(sequence), 1.0, np.float32)
        if i in self.tied:
            closest[self.tied[i]] = ROUTER_TIE / 2
        rows = np.array([truth(s, p) for p, s in enumerate(sequence)], np.float32)
        probes = {"model.layers.0.post_attention_layernorm": rows}
        return Trace(rows if self.logits else np.zeros((0, 0), np.float32), probes, closest)


def truth(token: int, position: int) -> Logits:
    """Logits of a token at a place: nothing in particular."""
    return np.cos(np.arange(VOCAB) * (1 + token + 0.37 * position)).astype(np.float32)


@dataclass
class Says:
    """A candidate that is right before position `wrong_from` of a sequence and wrong from there on."""

    wrong_from: dict[int, int]
    logits: bool = True
    done: tuple[int, ...] = (0,) * 6
    probes: dict[str, Any] | None = None

    def prefill(self, tokens: list[list[int]]) -> Logits:
        self.done = (0,) * 6
        return self.extend(tokens)

    def extend(self, tokens: list[list[int]]) -> Logits:
        rows = [
            [self.row(i, d + n, t) for n, t in enumerate(new)] for i, (d, new) in enumerate(self.pairs(tokens))
        ]
        self.done = tuple(d + len(new) for d, new in self.pairs(tokens))
        self.probes = {"model.layers.0.post_attention_layernorm": np.concatenate(rows)}
        return np.array([r[-1] for r in rows]) if self.logits else np.zeros((0, 0), np.float32)

    def decode(self, tokens: list[int]) -> Logits:
        return self.extend([[t] for t in tokens])

    def pairs(self, tokens: list[list[int]]) -> list[tuple[int, list[int]]]:
        return list(zip(self.done, tokens, strict=True))

    def row(self, i: int, position: int, token: int) -> Logits:
        return truth(token, position) + np.float32(position >= self.wrong_from.get(i, 10**6))


def judged(tied: dict[int, int], wrong: dict[int, int], logits: bool = True) -> Comparison:
    return compare(Says(wrong, logits), Told(tied, logits), VOCAB, 128, steps=2)  # type: ignore[arg-type]


def test_without_ties_all_rows_are_judged() -> None:
    result = judged({}, {})
    assert result.ok
    assert (result.rows, result.undecided) == (36, 0)  # 6 sequences: two prompts and four steps
    assert result.closest_routing == 1.0


def test_rows_behind_a_tie_are_left_out_and_counted() -> None:
    result = judged({2: 0, 4: 0}, {2: 0, 4: 0})
    assert result.ok
    assert (result.rows, result.undecided) == (24, 12)
    assert result.closest_routing == 1.0  # of what was judged


def test_rows_before_a_tie_are_judged() -> None:
    found = judged({2: 5}, {2: 5})
    assert found.ok
    assert found.undecided == 6
    assert not judged({2: 5}, {2: 4}).ok
    assert judged({2: 5}, {2: 4}).first.startswith("model.layers.0.self_attn")


def test_a_tie_in_one_sequence_does_not_hide_an_error_in_another() -> None:
    assert not judged({2: 0}, {3: 0}).ok


@pytest.mark.parametrize("tied", [4, 5, 6])
def test_more_rows_left_out_than_judged_is_no_proof(tied: int) -> None:
    assert not judged(dict.fromkeys(range(tied), 0), {}).ok
    assert judged(dict.fromkeys(range(3), 0), {}).ok


def test_of_the_first_layers_too_something_must_have_been_judged() -> None:
    """Without logits only norms are compared: if every position is behind a tie, nothing was."""
    every = dict.fromkeys(range(6), 0)
    assert judged({}, {}, logits=False).ok
    assert not judged({}, {1: 0}, logits=False).ok
    assert not judged(every, every, logits=False).ok


def test_of_the_first_layers_too_most_must_have_been_judged() -> None:
    assert not judged(dict.fromkeys(range(5), 0), {}, logits=False).ok


def test_sequences_with_a_tie_are_drawn_again() -> None:
    reference = Told({1: 3})
    compare(Says({}), reference, VOCAB, 128, steps=2)  # type: ignore[arg-type]
    assert 1 <= reference.redrawn <= 10


def test_a_trace_is_decided_up_to_its_first_tie() -> None:
    trace = Trace(np.zeros((4, 1), np.float32), {}, np.array([1, ROUTER_TIE * 1.01, 0, 1], np.float32))
    assert trace.decided == 2
    assert replace(trace, closest=np.ones(4, np.float32)).decided == 4


def test_the_definition_used_here_finds_the_choice_among_all() -> None:
    """Of all pairs of experts in the best group, the chosen one has the largest sum."""
    m, scores = moe(6, 2, 2, 1, "sigmoid"), [0.9, 0.6, 0.1, 0.1, 0.62, 0.52]
    best = max(itertools.combinations(range(3), 2), key=lambda pair: sum(scores[e] for e in pair))
    assert chosen(scores, m) == ({0}, set(best))
