"""The real SGLang server on a CPU against transformers' generate, token for token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv_runtime.serving.settings import REQUIRE_SIGNATURE
from msconv_runtime.sglang.environment import cpu_environment
from tests.commands import run_msconv
from tests.e2e import logprobs
from tests.e2e.servers import NEW_TOKENS, Server, expected, make_artifact, run, serving
from tests.every import one_of_many
from tests.signing import Keys, make_keys

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

CHUNK = 64


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def artifact(random_checkpoint: Path, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed, and served by who requires that."""
    root = make_artifact(random_checkpoint, tmp_path_factory.mktemp("serve") / "artifact")
    run("sign", root, "--key", keys.private)
    return root


GRAPHS = {
    "1": ["mixed_compiled", "verify_compiled"],
    "0": ["decode", "prefill", "verify"],
}  # MSCONV_COMPILED: with compiled kernels, and without


@pytest.fixture(scope="module", params=["1", pytest.param("0", marks=one_of_many("test-servers"))])
def server(artifact: Path, keys: Keys, request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving_with(request.param, artifact, keys) as s:
        yield s


@contextlib.contextmanager
def serving_with(compiled: str, artifact: Path, keys: Keys) -> Iterator[Server]:
    log = artifact.with_name(f"server-{compiled}.log")
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as environment:  # of this server alone
            environment.setenv("MSCONV_COMPILED", compiled)
            environment.setenv(REQUIRE_SIGNATURE, str(keys.public))
            s = running.enter_context(serving(artifact, log, "--chunked-prefill-size", str(CHUNK)))
        yield s


def test_the_log_shows_the_slot_and_the_warm_up_before_ready(
    server: Server, request: pytest.FixtureRequest
) -> None:
    log, graphs = server.log, GRAPHS[request.node.callspec.params["server"]]
    assert "type=MindSporeForCausalLM" in log
    (warmed_up,) = re.findall(r"bound, (.*) warmed up", log)
    assert sorted(warmed_up.split(" and ")) == graphs
    assert log.index("warmed up") < log.index("Uvicorn running")
    assert server.state()["graphs"] == graphs


def test_processes_begin_as_copies_of_the_first(server: Server) -> None:
    """Started anew, each would import everything once more, and SGLang would say once more what it lacks."""
    assert server.log.count("XPU support AWQ currently.\n") == 1


@pytest.mark.parametrize("at_once", [False, True])
def test_prompts_give_transformers_tokens(
    server: Server, model: Any, prompts: list[list[int]], at_once: bool
) -> None:
    assert server.answers(prompts, NEW_TOKENS, at_once) == [expected(model, ids) for ids in prompts]


def test_a_repeated_prompt_hits_the_prefix_cache_and_answers_the_same(server: Server, model: Any) -> None:
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, 90).tolist()
    first = server.generate(ids, NEW_TOKENS)
    longer = [*ids, 3, 1, 4]
    second, third = server.generate(ids, NEW_TOKENS), server.generate(longer, NEW_TOKENS)
    assert second["meta_info"]["cached_tokens"] > 0
    assert third["meta_info"]["cached_tokens"] > 0
    assert first["output_ids"] == second["output_ids"] == expected(model, ids)
    assert third["output_ids"] == expected(model, longer)


def test_a_prompt_longer_than_the_prefill_chunk(server: Server, model: Any) -> None:
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, 7 * CHUNK + 5).tolist()
    assert server.generate(ids, NEW_TOKENS)["output_ids"] == expected(model, ids)


def test_streaming_gives_the_same_tokens_in_pieces(server: Server, model: Any) -> None:
    ids = np.random.default_rng(4).integers(0, model.config.vocab_size, 20).tolist()
    body = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        "stream": True,
    }
    lines = server.post("/generate", body).decode().splitlines()
    events = [json.loads(x[6:]) for x in lines if x.startswith("data: ") and x != "data: [DONE]"]
    assert len(events) > 1
    assert events[-1]["output_ids"] == expected(model, ids)


def test_log_probabilities_of_prompts_beside_other_requests(
    server: Server, model: Any, prompts: list[list[int]]
) -> None:
    """From the begin, from within, from the last token; some longer than a chunk; answered together."""
    asked = [(ids, start) for ids in prompts for start in dict.fromkeys((0, len(ids) // 2, len(ids) - 1))]
    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(server.generate, ids, NEW_TOKENS) for ids in prompts[::2]]
        answers = list(pool.map(lambda one: logprobs.ask(server, *one), asked))
    for (ids, start), answer in zip(asked, answers, strict=True):
        logprobs.check(model, ids, start, answer)
    assert [o.result()["output_ids"] for o in others] == [expected(model, ids) for ids in prompts[::2]]


def test_log_probabilities_after_a_cached_prefix_and_over_many_chunks(server: Server, model: Any) -> None:
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, 7 * CHUNK + 5).tolist()
    server.generate(ids[:90], 1)
    for start in (0, 70, 6 * CHUNK):
        answer = logprobs.ask(server, ids, start, NEW_TOKENS)
        logprobs.check(model, ids, start, answer)
        assert (answer["meta_info"]["cached_tokens"] > 0) == (start > 0)
        assert answer["output_ids"] == expected(model, ids)
    assert server.state()["compiles_since_ready"] == 0


def test_completions_echo_the_prompt_with_its_log_probabilities(
    server: Server, model: Any, random_checkpoint: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_checkpoint)
    text = "Simple is better than complex."
    ids = tokenizer(text)["input_ids"]
    rows = logprobs.reference(model, ids)
    wanted = [float(row[token]) for row, token in zip(rows[:-1], ids[1:], strict=True)]
    for prompt in (text, ids, [ids, ids[:3]]):
        choice = logprobs.completion(server, prompt)["choices"][0]
        assert choice["text"].startswith(text)
        found = choice["logprobs"]["token_logprobs"]
        assert found[0] is None
        np.testing.assert_allclose(found[1:-1], wanted, atol=logprobs.BOUND)
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:-1]]
        np.testing.assert_allclose(best, rows[:-1].max(-1).values, atol=logprobs.BOUND)


def test_scores_of_the_next_token(server: Server, model: Any) -> None:
    query, items, labels = [5, 6, 7], [[8, 9], [10]], [3, 4]
    body = {"model": "any", "query": query, "items": items, "label_token_ids": labels, "apply_softmax": False}
    found = json.loads(server.post("/v1/score", body))["scores"]
    wanted = [logprobs.reference(model, [*query, *item])[-1, labels].exp().tolist() for item in items]
    np.testing.assert_allclose(found, wanted, atol=logprobs.BOUND)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"logprob_start_len": 0, "top_logprobs_num": 500, "token_ids_logprob": [5] * 40}, "at most 1048576"),
        ({"logprob_start_len": -2}, "logprob_start_len is -2"),
    ],
)
def test_too_many_log_probabilities_are_a_400(server: Server, more: dict[str, Any], said: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.generate([3] * 2000, 1, return_logprob=True, **more)
    assert refused.value.code == 400
    assert said in refused.value.read().decode()


def test_chat_completions_follow_the_chat_template(server: Server, model: Any, random_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_checkpoint)
    messages = [{"role": "user", "content": "Simple is better than"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    body = {"model": "any", "messages": messages, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    reply = json.loads(server.post("/v1/chat/completions", body))
    text = tokenizer.decode(expected(model, list(ids), 12), skip_special_tokens=True)
    assert reply["choices"][0]["message"]["content"] == text
    assert reply["usage"]["prompt_tokens"] == len(ids)


def test_without_compiled_kernels_the_tokens_are_the_same(
    artifact: Path, keys: Keys, model: Any, prompts: list[list[int]]
) -> None:
    """All that the other server is asked, this one is too by `make test-servers`."""
    with serving_with("0", artifact, keys) as server:
        assert server.state()["graphs"] == GRAPHS["0"]
        assert server.answers(prompts, NEW_TOKENS, at_once=True) == [expected(model, ids) for ids in prompts]
        logprobs.check(model, prompts[7], 0, logprobs.ask(server, prompts[7], 0))
        assert server.state()["compiles_since_ready"] == 0


def test_a_printed_command_checks_the_signature_itself(artifact: Path, keys: Keys, tmp_path: Path) -> None:
    root = Path(shutil.copytree(artifact, tmp_path / "own"))
    shown = run_msconv("serve", root, "--require-signature", keys.public, "--print-command", "--json").json
    (root / "notes.md").write_text("a file that the manifest would let pass")
    environment = {**os.environ, **shown["environment"]}
    done = subprocess.run(shown["argv"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "notes.md: was not signed" in done.stderr
    assert "warmed up" not in done.stderr + done.stdout


def test_other_models_go_to_upstreams_own_class(random_checkpoint: Path) -> None:
    code = f"""
from types import SimpleNamespace
from msconv_runtime.sglang import slot
config = SimpleNamespace(_name_or_path={str(random_checkpoint)!r}, architectures=["NoSuchForCausalLM"])
model = slot.MindSporeForCausalLM.__new__(slot.MindSporeForCausalLM)
slot.upstream._get_arch_from_config = lambda config: "upstream's " + config.architectures[0]
print(model.get_arch(config))
"""

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **cpu_environment()}
    )
    assert done.stdout.strip().endswith("upstream's NoSuchForCausalLM"), done.stderr[-2000:]


@one_of_many("test-servers")
def test_the_served_demonstration_continues_the_text(
    zen_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from demo.checkpoint import zen_lines

    work = tmp_path_factory.mktemp("zen-serve")
    run("convert", "--model", zen_checkpoint, "--tp", 1, "--dtype", "bfloat16", "--output", work / "a")
    run("compile", work / "a")
    run("verify", work / "a", "--reference", zen_checkpoint)
    with serving(work / "a", work / "log") as server:
        for line in zen_lines()[:6]:
            start = " ".join(line.split()[:3])
            body = {"text": start, "sampling_params": {"temperature": 0, "max_new_tokens": 40}}
            assert start + json.loads(server.post("/generate", body))["text"] == line
