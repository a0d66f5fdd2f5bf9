"""Codes by place, and led rounding: what is explained by a tie, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from msconv.verify.int8.arithmetic import Quotients, by_input, by_token, product, quantise_rows
from msconv.verify.int8.codes import Record
from msconv.verify.int8.drift import (
    OWN,
    SHIPPED,
    agreement,
    divergence,
    ends_of,
    perplexity,
    tokens_of,
    windows_of,
)
from msconv.verify.int8.lead import TIE, Lead, Verdict
from msconv.verify.reference import Trace
from msconv_runtime.errors import UsageError

MATRIX = "model.layers.0.self_attn.qkv_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EXPERTS_UP = "model.layers.1.mlp.experts.gate_up_proj.weight"
EXPERTS_DOWN = "model.layers.1.mlp.experts.down_proj.weight"


def codes(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int8)


def led(exact: list[list[float]], theirs: torch.Tensor, decided: int = 9) -> tuple[torch.Tensor, Verdict]:
    """One sequence whose tokens have these quotients, led by a candidate with those codes."""
    record = Record((1, len(exact)), tp=1)
    record.begin()
    record.saw(0, MATRIX, theirs, None)
    record.place([(0, t) for t in range(len(theirs))], "prefill")
    lead = Lead()
    lead.begin(record)
    quotients = Quotients(torch.tensor(exact, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    found = lead.codes(MATRIX, 0, quotients)
    return found, lead.verdict([decided], [len(exact)])


def test_a_neighbour_is_taken_at_a_tie_and_nowhere_else() -> None:
    near, far = 3.5 + TIE / 2, 3.5 + TIE * 2
    taken, verdict = led([[near, far, -7.2]], codes([3, 3, -7]))
    assert taken.tolist() == [[3, 4, -7]]
    assert (verdict.compared, verdict.led, verdict.unexplained) == (3, 1, 1)
    assert "column 1: 3, and 3.5040" in verdict.place
    assert not verdict.ok


def test_two_steps_are_no_neighbour_even_at_a_tie() -> None:
    taken, verdict = led([[3.5]], codes([5]))
    assert taken.tolist() == [[4]]
    assert verdict.unexplained == 1


def test_too_many_ties_are_no_proof() -> None:
    half = [[0.5] * 4]
    _, verdict = led(half, codes([1, 0, 0, 0]))
    assert verdict.unexplained == 0
    assert verdict.share == 0.25
    assert not verdict.ok


def test_codes_that_agree_are_a_proof() -> None:
    _, verdict = led([[1.2, -3.3], [0.0, 127.0]], codes([1, -3], [0, 127]))
    assert verdict.ok
    assert verdict.groups == {"model.layers.0.self_attn": (4, 0)}


def test_tokens_behind_a_tie_of_routing_are_left_out() -> None:
    _, verdict = led([[1.2], [1.2]], codes([1], [90]), decided=1)
    assert verdict.ok
    assert verdict.compared == 1


def test_a_token_without_codes_is_named() -> None:
    _, verdict = led([[1.2], [1.2]], codes([1]))
    assert verdict.unexplained == 1
    assert "position 1" in verdict.place


def test_rows_of_sequences_one_after_another_meet_their_own_codes() -> None:
    record = Record((2, 3), tp=1)
    record.saw(0, MATRIX, codes([1], [2], [3], [9]), None)
    record.place([(0, 0), (1, 0), (1, 1), (1, 2)], "prefill")
    lead = Lead()
    lead.begin(record, [1, 3])
    lead.codes(MATRIX, 0, Quotients(torch.tensor([[1.0], [2.0], [3.0], [4.0]]).double(), torch.ones(1, 1)))
    verdict = lead.verdict([9, 9], [1, 3])
    assert (verdict.compared, verdict.unexplained) == (4, 1)
    assert "sequence 1, position 2, column 0: 9, and 4.0000" in verdict.place


def test_an_input_that_only_one_of_both_rounds_is_named() -> None:
    record = Record((1, 1), tp=1)
    record.saw(0, DOWN, codes([1]), None)
    record.place([(0, 0)], "prefill")
    lead = Lead()
    lead.begin(record)
    lead.codes(MATRIX, 0, Quotients(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1)))
    verdict = lead.verdict([9], [1])
    assert verdict.place == f"{MATRIX}: no codes of its input were recorded"
    record.inputs[MATRIX, 0] = record.inputs[DOWN, 0]
    lead.begin(record)
    lead.codes(MATRIX, 0, Quotients(torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1)))
    assert lead.verdict([9], [1]).place == f"{DOWN}: the candidate rounds its input, and the reference does not"


def test_ranks_with_the_same_input_must_have_the_same_codes() -> None:
    record = Record((1, 2), tp=2)
    for rank, row in enumerate(([1, 2], [1, 3])):
        record.saw(rank, DOWN, codes(row, row), None)
    record.place([(0, 0), (0, 1)], "decode")
    assert not record.apart  # each rounds its own columns
    assert set(record.inputs) == {(DOWN, 0), (DOWN, 1)}
    for rank, row in enumerate(([1, 2], [1, 3])):
        record.saw(rank, MATRIX, codes([1, 2], row), None)
    record.place([(0, 0), (0, 1)], "decode")
    assert record.apart.startswith(
        f"{MATRIX} on rank 1 in decode: the code of sequence 0, position 1, column 1 is 3"
    )


def test_rows_that_are_not_one_a_token_are_named() -> None:
    record = Record((1, 2), tp=1)
    record.saw(0, MATRIX, codes([1]), None)
    record.place([(0, 0), (0, 1)], "prefill")
    assert "1 rows of codes for 2 tokens" in record.apart


def test_calls_are_put_together_by_sequence_and_position() -> None:
    record = Record((2, 3), tp=1)
    for places, row in (([(0, 0), (1, 0)], 1), ([(1, 1)], 5), ([(0, 1), (1, 2)], 8)):
        record.begin()
        record.saw(0, MATRIX, torch.arange(row, row + len(places), dtype=torch.int8)[:, None], None)
        record.place(places, "decode")
    entry = record.inputs[MATRIX, 0]
    assert entry.codes[..., 0].tolist() == [[1, 8, 0], [2, 5, 9]]
    assert entry.seen.tolist() == [[True, True, False], [True, True, True]]


def test_only_the_ranks_that_have_an_expert_say_its_codes() -> None:
    """Four ranks in two groups of two experts; two ranks of a group divide an expert's columns."""
    record = Record((1, 1), tp=4, ep=2, experts=4)
    ids = torch.tensor([[3, 0]])
    for rank in range(4):
        mine = [[7, 7], [99, 99]] if rank > 1 else [[99, 99], [7, 7]]
        record.saw(rank, EXPERTS_UP, codes(mine), ids)
        record.saw(rank, EXPERTS_DOWN, codes([[rank, rank], [rank, rank]]), ids)
    record.place([(0, 0)], "prefill")
    assert not record.apart
    assert record.inputs[EXPERTS_UP, 0].codes.tolist() == [[[7, 7]]]
    assert record.inputs[EXPERTS_DOWN, 0].codes.tolist() == [[[[2, 2], [0, 0]]]]
    assert record.inputs[EXPERTS_DOWN, 1].codes.tolist() == [[[[3, 3], [1, 1]]]]
    lead = Lead()
    lead.begin(record)
    exact = Quotients(torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.ones(1, 1))
    row = torch.tensor([0])
    assert lead.codes_of_expert(EXPERTS_DOWN, 1, 0, row, exact).tolist() == [[1, 1]]
    assert lead.verdict([1], [1]).unexplained == 0
    lead.codes_of_expert(EXPERTS_DOWN, 0, 3, row, exact)
    assert lead.verdict([1], [1]).unexplained == 2
    lead.codes_of_expert(EXPERTS_DOWN, 0, 2, row, exact)  # which the candidate did not choose
    assert lead.verdict([1], [1]).unexplained == 4


@pytest.mark.parametrize("columns", [7, 1024, 3000])
def test_products_of_codes_are_exact(columns: int) -> None:
    rng = np.random.default_rng(columns)
    a, b = (rng.integers(-128, 128, (n, columns), dtype=np.int8) for n in (3, 5))
    a[0], b[0] = -128, -128
    found = product(torch.from_numpy(a), torch.from_numpy(b))
    assert np.array_equal(found.numpy(), a.astype(np.int64) @ b.astype(np.int64).T)


def test_rows_are_quantised_with_scales_that_bfloat16_has() -> None:
    values = torch.tensor([[1.0, -0.5, 0.003], [0.0, 0.0, 0.0], [3e38, 1e38, -3e38]])
    found, scales = quantise_rows(values)
    assert torch.equal(scales, scales.bfloat16().float())
    assert found.tolist() == [[127, -64, 0], [0, 0, 0], [127, 42, -127]]
    assert scales[1].item() == 2.0**-126


def test_activations_get_a_scale_a_token_or_one_for_all() -> None:
    x = torch.tensor([[2.0, -1.0], [0.0, 0.0]])
    token = by_token(x)
    assert token.codes.tolist() == [[127, -64], [0, 0]]  # -63.5 to even
    assert token.scale.tolist() == [[pytest.approx(2 / 127)], [0.0]]
    found = by_input(x, torch.tensor([0.01]), torch.tensor([-5.0]))
    assert found.codes.tolist() == [[127, -105], [-5, -5]]


def test_drift_is_zero_of_equal_logits_and_known_of_others() -> None:
    p = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    q = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    assert divergence(p, p) == 0.0
    assert divergence(p, q) == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2, rel=1e-5)
    assert agreement(p, q) == 0.5
    trace = Trace(p, {}, np.full(2, np.inf, np.float32))
    assert perplexity([trace], [[0, 1]]) == pytest.approx(2.0)


def test_a_text_beside_the_source_comes_before_the_one_that_ships(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(40)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*words, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokens_of(tmp_path, None, 41)[1] == SHIPPED
    (tmp_path / OWN).write_text(" ".join(words))
    assert tokens_of(tmp_path, None, 41) == (list(range(40)), OWN)
    given = tmp_path / "given.txt"
    given.write_text(" ".join(reversed(words)))
    assert tokens_of(tmp_path, given, 41) == (list(reversed(range(40))), "given.txt")
    (tmp_path / OWN).write_text("w1 w2")
    with pytest.raises(UsageError, match="makes 2 tokens"):
        tokens_of(tmp_path, None, 41)


def test_an_end_token_separates_documents(tmp_path: Path) -> None:
    """A row that follows the end of a text is decided by nothing: it is not compared."""
    config = tmp_path / "config.json"
    for value, ends in ((9, {9}), ([9, 8], {8, 9}), (None, set()), (True, set())):
        config.write_text(json.dumps({"eos_token_id": value}))
        assert ends_of(tmp_path) == ends
    assert windows_of([1, 2, 3, 9, 4, 9, 5, 6, 9, 9], frozenset({9}), 2) == [[1, 2], [5, 6]]
    assert windows_of([1, 2, 9, 3], frozenset(), 3) == [[1, 2, 9]]
