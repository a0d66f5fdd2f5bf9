"""Answers against the reference, and against the logits that they came of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from msconv.rehearsal.answers import Expected
from msconv.rehearsal.loading import device_problems
from msconv.rehearsal.records import Rank
from msconv.rehearsal.replay import Row
from msconv.rehearsal.scenario import NEW_TOKENS, Conversation, answer_problems, make_scenario
from msconv.verify.reference import Trace

VOCAB = 50
BOUND = 1e-4


def logits(tokens: tuple[int, ...]) -> Any:
    """What a model would say after these tokens."""
    return np.random.default_rng(hash(tokens) % 2**32).normal(size=VOCAB).astype(np.float32)


class Model:
    """A reference whose router is undecided from a position on."""

    def __init__(self, decided: int = 10**6) -> None:
        self.decided = decided

    def traces(self, sequences: list[list[int]]) -> list[Trace]:
        found = []
        for s in sequences:
            rows = np.stack([logits(tuple(s[: i + 1])) for i in range(len(s))])
            closest = np.where(np.arange(len(s)) < self.decided, 1.0, 0.0).astype(np.float32)
            found.append(Trace(rows, {}, closest))
        return found


def talk(prompt: list[int], count: int = NEW_TOKENS, name: str = "a") -> Conversation:
    answer: list[int] = []
    for _ in range(count):
        answer.append(int(logits((*prompt, *answer)).argmax()))
    return Conversation(name, prompt, answer)


def rows(conversation: Conversation) -> list[Row]:
    """What the calls gave: a prompt at once, then token by token."""
    tokens, begin = tuple(conversation.tokens), len(conversation.prompt)
    return [Row(tokens[:n], logits(tokens[:n])) for n in range(begin, len(tokens) + 1)]


def judged(
    conversation: Conversation,
    found: list[Row],
    bound: float = BOUND,
    model: Model | None = None,
    drafts: int = 0,
) -> Expected:
    reference: Any = model or Model()
    expected = Expected([conversation], reference, VOCAB, complete=True, drafts=drafts)
    expected.judge(bound)
    expected.compare("start-up", [Row((7, 7), logits((7, 7)))])
    for i, row in enumerate(found):
        expected.compare(f"call {i}", [row])
    expected.finish()
    return expected


def test_right_answers_have_no_problem() -> None:
    found = judged(talk([3, 1, 4]), rows(talk([3, 1, 4])))
    assert found.answers.problems == []
    assert (found.answers.tokens, found.answers.equal, found.answers.error) == (NEW_TOKENS, NEW_TOKENS, 0.0)


def test_what_follows_a_wrong_guess_belongs_to_no_request_and_is_no_problem() -> None:
    """The first token of a verification must belong to one; without drafts all must."""
    conversation = talk([3, 1, 4])
    found = rows(conversation)
    guessed = (*conversation.tokens[:5], 49, 48)
    past_the_end = (*conversation.tokens, 7)
    more = [Row(guessed[:6], logits(guessed[:6]), 1), Row(past_the_end, logits(past_the_end))]
    assert judged(conversation, [*found, *more], drafts=4).answers.problems == []
    assert len(judged(conversation, [*found, *more]).answers.problems) == 2
    lost = [Row((9, 9, 9), logits((9, 9, 9)))]
    (problem,) = judged(conversation, [*found, *lost], drafts=4).answers.problems
    assert "belongs to no request" in problem


def logprobs(prompt: list[int]) -> list[float]:
    values = []
    for position in range(1, len(prompt)):
        row = logits(tuple(prompt[:position])).astype(np.float64)
        values.append(float(row[prompt[position]] - np.log(np.exp(row).sum())))
    return values


def test_log_probabilities_of_a_prompt_are_compared_and_a_wrong_one_is_named() -> None:
    asked = replace(talk([3, 1, 4, 1]), logprobs=logprobs([3, 1, 4, 1]))
    found = judged(asked, rows(asked))
    assert (found.answers.problems, found.answers.logprobs) == ([], 3)
    asked.logprobs[1] += 3 * BOUND
    assert "log probability of token 2 of the prompt" in judged(asked, rows(asked)).answers.problems[0]
    asked.logprobs[1] = float("nan")
    assert "is nan" in judged(asked, rows(asked), float("inf")).answers.problems[0]


def test_missing_log_probabilities_are_told() -> None:
    scenario = make_scenario(VOCAB, 4096, 128)
    asked = [(name, kind, ids) for group in scenario.groups for name, kind, ids in group]
    answers = [replace(talk([1, 2], name=name), whole=kind != "abort") for name, kind, _ in asked]
    answers.append(talk([1], name="n = 2"))
    assert list(answer_problems(answers, scenario)) == [
        "request 'log probabilities': 0 log probabilities for 2 tokens"
    ]


def test_a_wrong_token_is_named_with_its_request() -> None:
    wrong = talk([3, 1, 4])
    wrong.answer[2] = (wrong.answer[2] + 1) % VOCAB
    assert "request 'a': token 2 of the answer" in judged(wrong, rows(wrong)).answers.problems[0]


@pytest.mark.parametrize("bound", [BOUND, float("inf")])
def test_a_token_that_its_call_did_not_choose_is_named_with_the_call(bound: float) -> None:
    """Also where rounding leaves no bound to transformers."""
    wrong = talk([3, 1, 4])
    wrong.answer[2] = (wrong.answer[2] + 1) % VOCAB
    told = judged(wrong, rows(wrong), bound).answers.problems
    assert any(p.startswith("call 2: the best token after 5 tokens is") for p in told), told


def test_logits_that_differ_are_named_with_the_call() -> None:
    found = rows(talk([3, 1, 4]))
    found[3] = replace(found[3], logits=found[3].logits + 1e-3)
    assert judged(talk([3, 1, 4]), found).answers.problems[0].startswith("call 3: logits after 6 tokens differ")


def test_a_token_that_comes_from_no_call_is_told() -> None:
    found = rows(talk([3, 1, 4]))
    del found[5]
    assert judged(talk([3, 1, 4]), found).answers.problems == [
        "request 'a': token 5 of the answer comes from no call"
    ]


def test_a_sequence_of_nobody_is_told_once_requests_have_begun() -> None:
    found = [*rows(talk([3, 1, 4])), Row((9, 9, 9), logits((9, 9, 9)))]
    assert "belongs to no request" in judged(talk([3, 1, 4]), found).answers.problems[0]


def test_what_comes_after_a_routers_tie_is_not_judged() -> None:
    found = judged(talk([3, 1, 4]), rows(talk([3, 1, 4])), model=Model(8))
    assert found.answers.problems == []
    assert found.answers.tokens + found.answers.undecided == NEW_TOKENS
    assert found.answers.undecided > 0


def test_answers_that_are_short_or_missing_are_told() -> None:
    scenario = make_scenario(VOCAB, 4096, 128, 10)
    names = [name for group in scenario.groups for name, _, _ in group]
    right = [talk([1], name=name) for name in [*names, "n = 2"]]
    assert list(answer_problems(right, scenario)) == []
    assert list(answer_problems(right[:-1], scenario)) == ["request 'n = 2': 1 answers of 2"]
    short = [replace(right[0], answer=right[0].answer[:5]), *right[1:]]
    assert list(answer_problems(short, scenario)) == [f"request {names[0]!r}: 5 tokens were answered"]
    cold = [replace(right[0], expect_cached=128), *right[1:]]
    assert "0 tokens came from the cache" in next(answer_problems(cold, scenario))
    assert list(answer_problems(cold, replace(scenario, expects_cache=False))) == []


def test_two_ranks_on_one_device_are_told(tmp_path: Any) -> None:
    def ranks(*devices: int) -> list[Rank]:
        return [Rank(i, tmp_path, [{"what": "set_device", "id": d}]) for i, d in enumerate(devices)]

    assert list(device_problems([ranks(0, 1)], 1)) == []
    assert list(device_problems([ranks(0, 0)], 2)) == []
    assert list(device_problems([ranks(0, 0)], 1)) == ["devices: rank 1 and rank 0 are both on device 0"]
    assert list(device_problems([ranks(0), ranks(1)], 1)) == []
    assert list(device_problems([ranks(0), ranks(0)], 1)) == [
        "devices: rank 0 of copy 1 and rank 0 of copy 0 are both on device 0"
    ]
