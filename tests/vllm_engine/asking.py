"""Requests to vLLM's server, in tokens."""

from __future__ import annotations

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.e2e.servers import Server


@dataclass(frozen=True)
class Answer:
    """`logprobs`: of each token of the answer."""

    tokens: list[int]
    logprobs: list[float]


def ask(server: Server, ids: list[int], new: int, **more: Any) -> Answer:
    body = {"prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    found = json.loads(server.post("/v1/completions", {**body, "logprobs": 2, **more}))["choices"][0]
    return Answer(found["token_ids"], found["logprobs"]["token_logprobs"])


def ask_all(server: Server, prompts: list[list[int]], new: int, at_once: bool = False) -> list[Answer]:
    """Answers in the prompts' order, asked for one after another or all at once."""
    with ThreadPoolExecutor(len(prompts) if at_once else 1) as pool:
        return list(pool.map(lambda ids: ask(server, ids, new), prompts))


def counted(server: Server, name: str) -> float:
    """The value of one of vLLM's counters."""
    text = get(server, "/metrics")
    found = re.search(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.M)
    assert found, name
    return float(found[1])


def get(server: Server, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=60) as reply:
        text: str = reply.read().decode()
    return text
