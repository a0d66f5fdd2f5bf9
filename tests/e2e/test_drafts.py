"""Speculative decoding on the real server: the tokens of greedy decoding, in as few steps as there should be."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e import drafting, logprobs
from tests.e2e.servers import NEW_TOKENS, Server, expected, make_artifact, serving
from tests.every import one_of_many

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

CHUNK = 64
DRAFTS, STEPS = 8, 3
BREADTH = {"chain": 1, "tree": 4}  # of NGRAM's drafts
UNCOMPILED = ("chain",)
TOPK = {"model": 1, "branches": 3}  # guesses of a draft model at each place


@pytest.fixture(scope="module")
def draft_checkpoint(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target, a little wrong: its drafts are accepted now and then."""
    import torch
    from transformers import AutoModelForCausalLM

    copy = AutoModelForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * (0.01 if parameter.dim() > 1 else 0))
    directory = tmp_path_factory.mktemp("draft") / "draft-qwen3"
    copy.save_pretrained(directory)
    for path in random_checkpoint.glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="module")
def answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The target's greedy tokens, with those that the last drafts are compared with."""
    return [expected(model, ids, NEW_TOKENS + DRAFTS) for ids in prompts]


SLOW = ("chain", "branches", "tree of 2 ranks", "model of 2 ranks")
KINDS = ["tree", "model", *(pytest.param(name, marks=one_of_many("test-servers")) for name in SLOW)]


@pytest.fixture(scope="module", params=KINDS)
def layout(request: pytest.FixtureRequest) -> tuple[str, int]:
    """What drafts, and over how many ranks."""
    name, _, of = request.param.partition(" of ")
    return name, 2 if of else 1


@pytest.fixture(scope="module")
def kind(layout: tuple[str, int]) -> str:
    return layout[0]


@pytest.fixture(scope="module")
def artifacts(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """By tp, each made once."""
    return cache(lambda tp: make_artifact(random_checkpoint, tmp_path_factory.mktemp("drafts") / "target", tp))


@pytest.fixture(scope="module")
def server(
    artifacts: Callable[[int], Path], layout: tuple[str, int], request: pytest.FixtureRequest
) -> Iterator[Server]:
    kind, tp = layout
    artifact = artifacts(tp)
    flags = ["--chunked-prefill-size", str(CHUNK)]
    if tp > 1:  # else SGLang takes what both ranks have imported for weights, where little memory is free
        flags += ["--mem-fraction-static", "0.8"]
    if kind in TOPK:
        draft = make_artifact(request.getfixturevalue("draft_checkpoint"), artifact.with_name("draft"), tp)
        flags += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(draft)]
        flags += ["--speculative-num-steps", str(STEPS), "--speculative-eagle-topk", str(TOPK[kind])]
        flags += ["--speculative-num-draft-tokens", str(DRAFTS if kind == "branches" else STEPS + 1)]
        flags += ["--page-size", "1"] if kind == "branches" else []
    else:
        flags += ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(DRAFTS)]
        flags += ["--speculative-ngram-max-bfs-breadth", str(BREADTH[kind])]
        flags += ["--page-size", "16" if kind == "chain" else "1"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MSCONV_COMPILED", "0" if kind in UNCOMPILED else "1")
        with serving(artifact, artifact.with_name(f"{kind}.log"), *flags) as s:
            yield s


def test_as_many_drafts_are_accepted_as_without_a_server(
    server: Server,
    kind: str,
    prompts: list[list[int]],
    answers: list[list[int]],
    request: pytest.FixtureRequest,
) -> None:
    """First of all: what the server has seen changes what NGRAM drafts."""
    server.post("/flush_cache", {})
    found = [server.generate(ids, NEW_TOKENS) for ids in prompts]
    assert [answer["output_ids"] for answer in found] == [answer[:NEW_TOKENS] for answer in answers]
    if kind in TOPK:
        import torch
        from transformers import AutoModelForCausalLM

        draft = AutoModelForCausalLM.from_pretrained(
            request.getfixturevalue("draft_checkpoint"), dtype=torch.float32
        ).eval()
        both = zip(prompts, answers, strict=True)
        if kind == "model":
            wanted = [drafting.of_model(draft, ids, answer, NEW_TOKENS, STEPS) for ids, answer in both]
        else:
            tree = (STEPS, TOPK[kind], DRAFTS)
            wanted = [drafting.of_branches(draft, ids, answer, NEW_TOKENS, *tree) for ids, answer in both]
        assert sum(map(len, wanted)) > len(wanted), "no draft is accepted: the test shows nothing"
    else:
        requests = list(zip(prompts, answers, strict=True))
        wanted = drafting.of_ngrams(requests, NEW_TOKENS, DRAFTS, BREADTH[kind])
    told = [answer["meta_info"]["spec_correct_drafts_histogram"] for answer in found]
    assert [drafting.trimmed(histogram) for histogram in told] == wanted


def test_prompts_at_once_and_again_give_the_tokens_of_greedy_decoding(
    server: Server, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    """What NGRAM has seen, it drafts: now most of its drafts are accepted."""
    wanted = [answer[:NEW_TOKENS] for answer in answers]
    assert server.answers(prompts, NEW_TOKENS, at_once=True) == wanted
    again = [server.generate(ids, NEW_TOKENS) for ids in prompts]
    assert [answer["output_ids"] for answer in again] == wanted
    assert sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in again) > 0


def test_after_a_cached_prefix_and_over_many_chunks(server: Server, model: Any) -> None:
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, 7 * CHUNK + 5).tolist()
    server.generate(ids[:90], NEW_TOKENS)
    for prompt in (ids, ids[:90], [*ids[:90], 3, 1, 4]):
        answer = server.generate(prompt, NEW_TOKENS)
        assert answer["meta_info"]["cached_tokens"] > 0
        assert answer["output_ids"] == expected(model, prompt)


def test_log_probabilities_beside_drafts(server: Server, model: Any, prompts: list[list[int]]) -> None:
    ids = prompts[7]
    answer = logprobs.ask(server, ids, 0, NEW_TOKENS)
    logprobs.check(model, ids, 0, answer)
    whole = ids + answer["output_ids"]
    rows = logprobs.reference(model, whole)
    values = [value for value, _, _ in answer["meta_info"]["output_token_logprobs"]]
    wanted = [float(rows[at - 1][whole[at]]) for at in range(len(ids), len(whole))]
    assert max(abs(v - w) for v, w in zip(values, wanted, strict=True)) < logprobs.BOUND


def test_nothing_was_compiled_for_a_request(server: Server, kind: str) -> None:
    state = server.state()
    assert state["compiles_since_ready"] == 0
    assert ("draft" in state) == (kind in TOPK)
    assert state.get("draft", state)["compiles_since_ready"] == 0
