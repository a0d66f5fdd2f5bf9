"""What servers meet: hundreds of requests that come and go, nonsense, a full port, a disk that is gone."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from msconv_runtime.kernels import library
from tests.e2e.servers import Server, expected, make_artifact, serving

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

REQUESTS = 500
AT_ONCE = 200
DISTINCT = 50
NEW = 8
CONTEXT = 512
GROWTH_BYTES = 96 << 20


@pytest.fixture(scope="module")
def artifact(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(random_checkpoint, tmp_path_factory.mktemp("bad-days") / "artifact")


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    flags = ("--chunked-prefill-size", "128", "--enable-mixed-chunk", "--context-length", str(CONTEXT))
    with serving(artifact, artifact.parent / "server.log", *flags) as s:
        yield s


def anonymous_bytes(server: Server) -> int:
    """Memory of the server's processes that no file stands for."""
    statuses = [Path(f"/proc/{p.pid}/status").read_text() for p in server.processes()]
    return sum(int(m[1]) << 10 for s in statuses if (m := re.search(r"RssAnon:\s+(\d+)", s)))


def drop_after_the_first_token(server: Server, ids: list[int]) -> None:
    """Hang up in the middle of an answer: SGLang aborts the request."""
    sampling = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
    body = json.dumps({"input_ids": ids, "sampling_params": sampling, "stream": True}).encode()
    kind = "Content-Type: application/json"
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=300) as s:
        s.sendall(head.encode() + body)
        seen = b""
        while b"data:" not in seen and (piece := s.recv(65536)):
            seen += piece


def refused(server: Server, body: bytes, path: str = "/generate") -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode(errors="replace")


def test_hundreds_of_requests_with_aborts_all_answer_right(server: Server, model: Any) -> None:
    rng = np.random.default_rng(11)
    lengths = rng.integers(1, 200, DISTINCT)
    prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]
    answers = [expected(model, ids, NEW) for ids in prompts]
    chosen = rng.integers(0, DISTINCT, REQUESTS)
    aborted = set(rng.choice(REQUESTS, REQUESTS // 10, replace=False).tolist())

    def ask(i: int) -> bool:
        ids = prompts[chosen[i]]
        if i in aborted:
            drop_after_the_first_token(server, ids)
            return True
        return bool(server.generate(ids, NEW, timeout_s=600)["output_ids"] == answers[chosen[i]])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert all(pool.map(ask, range(AT_ONCE)))
        before = anonymous_bytes(server)
        assert all(pool.map(ask, range(AT_ONCE, REQUESTS)))
    assert anonymous_bytes(server) - before < GROWTH_BYTES
    assert server.state()["compiles_since_ready"] == 0


def test_the_kernels_are_named(server: Server) -> None:
    assert server.state()["kernels"] == library().variant
    assert bool(library().variant) == (library().path is not None)


def test_start_up_is_told_apart(server: Server) -> None:
    assert server.state()["start_seconds"].keys() == {"import", "mmap", "bind", "warm up", "waited for"}


def test_several_answers_to_one_prompt(server: Server, model: Any) -> None:
    ids = [5, 6, 7, 8]
    sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True, "n": 3}
    replies = json.loads(server.post("/generate", {"input_ids": ids, "sampling_params": sampling}))
    assert [r["output_ids"] for r in replies] == [expected(model, ids, NEW)] * 3


def test_log_probabilities_of_what_was_generated(server: Server, model: Any) -> None:
    import torch

    ids = [9, 10, 11]
    reply = server.generate(ids, NEW, return_logprob=True)
    found = [value for value, _, _ in reply["meta_info"]["output_token_logprobs"]]
    whole = torch.tensor([ids + reply["output_ids"]])
    logits = model(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    right = logits.gather(1, torch.tensor(reply["output_ids"])[:, None])[:, 0]
    assert found == pytest.approx(right.tolist(), abs=1e-4)


def test_answers_keep_to_a_grammar(server: Server) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 6, "regex": "[0-9]{6}"}
    reply = json.loads(server.post("/generate", {"input_ids": [9, 10, 11], "sampling_params": sampling}))
    assert re.fullmatch("[0-9]{1,6}", reply["text"])


def test_a_prompt_longer_than_the_context_is_refused(server: Server) -> None:
    body = {"input_ids": [1] * (CONTEXT + 1), "sampling_params": {"max_new_tokens": 1}}
    code, text = refused(server, json.dumps(body).encode())
    assert (code, str(CONTEXT) in text) == (400, True), text


@pytest.mark.parametrize(
    "body",
    [
        b'{"input_ids": [], "sampling_params": {"max_new_tokens": 1}}',
        b'{"text": "", "sampling_params": {"max_new_tokens": 1}}',
        b'{"text": "\xff\xfe", "sampling_params": {"max_new_tokens": 1}}',
        b"{",
        b'{"input_ids": [99999999], "sampling_params": {"max_new_tokens": 1}}',
        b'{"input_ids": [-1], "sampling_params": {"max_new_tokens": 1}}',
        b'{"input_ids": [1, 2, 3], "return_logprob": true, "logprob_start_len": -2}',
        b'{"input_ids": [1, 2, 3], "return_logprob": true, "top_logprobs_num": 100000}',
        b'{"input_ids": [1, 2, 3], "sampling_params": {"min_new_tokens": 2, "stop_token_ids": [-7]}}',
        b'{"input_ids": [1, 2, 3], "return_hidden_states": true}',
        b'{"input_embeds": [[0.5, 0.5]]}',
    ],
    ids=[
        "empty prompt",
        "empty text",
        "invalid UTF-8",
        "no JSON",
        "no such token",
        "negative token",
        "prompt's logprobs, from the end",
        "logprobs of more tokens than there are",
        "no such token to stop at",
        "hidden states",
        "embeddings",
    ],
)
def test_nonsense_is_refused_and_the_server_goes_on(server: Server, model: Any, body: bytes) -> None:
    code, text = refused(server, body)
    assert 400 <= code < 500, text
    assert server.generate([3, 4], NEW)["output_ids"] == expected(model, [3, 4], NEW)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (
            "/v1/score",
            {
                "model": "default",
                "query": [1, 2],
                "items": [[3]],
                "label_token_ids": [4],
                "embed_override_token_id": 2,
                "query_embed_overrides": [[0.5] * 128],
            },
            "take no embeddings",
        ),
        ("/update_weights_from_disk", {"model_path": "/"}, "convert again"),
    ],
)
def test_what_an_artifact_cannot_do_is_refused(
    server: Server, model: Any, path: str, body: dict[str, Any], said: str
) -> None:
    code, text = refused(server, json.dumps(body).encode(), path)
    assert (400 <= code < 500, said in text) == (True, True), (code, text)
    assert server.generate([3, 4], NEW)["output_ids"] == expected(model, [3, 4], NEW)


def test_a_port_that_is_taken_is_said_before_anything_loads(server: Server, artifact: Path) -> None:
    command = [sys.executable, "-m", "msconv", "serve", str(artifact), "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert f"port {server.port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_disk_is_gone_and_the_server_goes_on(server: Server, artifact: Path, model: Any) -> None:
    shutil.move(artifact, artifact.parent / "elsewhere")
    shutil.rmtree(artifact.parent / "elsewhere")
    ids = list(range(20, 60))
    assert server.generate(ids, NEW)["output_ids"] == expected(model, ids, NEW)
    assert all(p.status() != psutil.STATUS_ZOMBIE for p in server.processes())
