"""vLLM's server on artifacts: tokens and log probabilities of transformers, cold, from the prefix cache, in chunks
and all at once, on one rank and on two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.servers import NEW_TOKENS, Server, expected, left_after, make_artifact, serving
from tests.vllm_engine.asking import Answer, ask, ask_all, counted, get
from tests.vllm_engine.conftest import CHUNK

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

BLOCK = 16

BOUND = 1e-3  # float32 sums in another order, in logits of some tens: about 1e-5 is found


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def server(
    request: pytest.FixtureRequest, random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    place = tmp_path_factory.mktemp(f"vllm-tp{request.param}")
    artifact = make_artifact(random_checkpoint, place / "artifact", request.param)
    flags = ("--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "16")
    with serving(artifact, place / "log", *flags, options=("--engine", "vllm"), start_s=600) as started:
        yield started
        processes = started.processes()
    assert left_after(processes, 30) == []


@pytest.fixture(scope="module")
def wanted(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [expected(model, ids) for ids in prompts]


def check(answers: list[Answer], model: Any, prompts: list[list[int]], wanted: list[list[int]]) -> None:
    """All tokens are transformers', and their log probabilities within BOUND."""
    import torch

    assert [a.tokens for a in answers] == wanted
    for answer, ids in zip(answers, prompts, strict=True):
        logits = model(torch.tensor([ids + answer.tokens])).logits[0, len(ids) - 1 : -1]
        right = logits.log_softmax(-1)[range(len(answer.tokens)), answer.tokens]
        assert (torch.tensor(answer.logprobs) - right).abs().max() < BOUND


def test_every_way_gives_transformers_answers(
    server: Server, model: Any, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    """Cold, with every whole block of every prompt from the cache, all at once with and without the cache."""
    assert max(map(len, prompts)) > 2 * CHUNK
    check(ask_all(server, prompts, NEW_TOKENS), model, prompts, wanted)
    assert counted(server, "prefix_cache_hits") == 0
    check(ask_all(server, prompts, NEW_TOKENS), model, prompts, wanted)
    assert counted(server, "prefix_cache_hits") == sum((len(ids) - 1) // BLOCK * BLOCK for ids in prompts)
    check(ask_all(server, prompts, NEW_TOKENS, at_once=True), model, prompts, wanted)
    swapped = [[ids[0] ^ 1, *ids[1:]] for ids in prompts]  # nothing of these is in the cache
    other = [expected(model, ids) for ids in swapped]
    check(ask_all(server, swapped, NEW_TOKENS, at_once=True), model, swapped, other)
    assert "compiles since ready: " not in server.log
    assert "compiles since ready are counted from here" in server.log


def test_ranks_that_sample_by_themselves_agree(server: Server, model: Any, prompts: list[list[int]]) -> None:
    """Each rank goes on with the token that it has sampled: were they not the same, the answer's log probabilities
    would be those of no sequence."""
    answers = [ask(server, ids, 40, temperature=1, **more) for ids in prompts[2:4] for more in ({}, {"seed": 5})]
    asked = [ids for ids in prompts[2:4] for _ in range(2)]
    assert answers[0].tokens != expected(model, asked[0], 40)
    check(answers, model, asked, [a.tokens for a in answers])


def test_what_the_graphs_cannot_answer_is_the_clients_mistake(
    server: Server, model: Any, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    odd: list[dict[str, Any]] = [
        {"prompt": prompts[4], "prompt_logprobs": 1},
        {"prompt": prompts[4], "echo": True, "logprobs": 1, "max_tokens": 1},
        {"prompt": [model.config.vocab_size]},
        {"prompt": [-1]},
        {"prompt": []},
        {"prompt": prompts[4], "max_tokens": 1 << 40},
        {"prompt": prompts[4], "logit_bias": {str(model.config.vocab_size): 1}},
    ]
    for body in odd:
        assert server.status("/v1/completions", body) in (400, 422), body
    assert ask(server, prompts[4], NEW_TOKENS).tokens == wanted[4]


def test_the_server_says_what_it_serves(server: Server) -> None:
    proof = json.loads(get(server, "/msconv/proof"))
    assert proof["target"] == "cpu"
    assert proof["weights"]["digest"].startswith("xxh3:")
    assert f"msconv: ready at http://127.0.0.1:{server.port}" in server.log
    assert "Once upon a time" in server.log  # a request that can be pasted
    sockets = [c for p in server.processes() for c in p.net_connections("inet")]
    listening = {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::1"}
