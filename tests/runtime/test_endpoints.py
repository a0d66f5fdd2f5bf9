"""Which endpoints a server answers: the table against SGLang's own routes, the gate before a toy application."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from msconv_runtime.sglang.asked import in_clients_words
from msconv_runtime.sglang.endpoints import ENDPOINTS, UNKNOWN, Gate, rule_for
from tests.runtime.routes import sglang_routes

ADMIN = sorted(path for path, rule in ENDPOINTS.items() if rule.access == "admin")
NEVER = sorted(path for path, rule in ENDPOINTS.items() if rule.access == "never")


class Toy:
    """An application that answers 200, and keeps what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answered"})


def ask(gate: Gate, path: str, body: bytes = b"", key: str = "", **scope: Any) -> tuple[int, str]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    asyncio.run(gate({"type": "http", "path": path, "headers": headers, **scope}, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


def test_every_route_of_sglang_is_in_the_table_and_nothing_else() -> None:
    assert set(sglang_routes()) - ENDPOINTS.keys() == set()
    assert ENDPOINTS.keys() - set(sglang_routes()) == {"/metrics"}  # mounted with --enable-metrics


def test_each_rule_that_refuses_has_a_reason() -> None:
    assert all(rule.why for rule in ENDPOINTS.values() if rule.access in ("admin", "never"))


@pytest.mark.parametrize(
    "path", ["/v1/models/a/b", "/v1/responses/x", "/v1/responses/x/cancel", "/generate", "/", "/health"]
)
def test_what_everybody_may_ask_is_answered(path: str) -> None:
    assert ask(Gate(Toy()), path) == (200, "answered")


@pytest.mark.parametrize("path", [*NEVER, *(f"{p}/" for p in ADMIN), "/new_in_another_version", "//slow_down", ""])
@pytest.mark.parametrize("key", ["", "right"])
def test_what_an_artifact_cannot_answer_is_refused_with_any_key(path: str, key: str) -> None:
    toy = Toy()
    code, text = ask(Gate(toy, "right"), path, key=key)
    assert code == (404 if rule_for(path) is UNKNOWN else 400)
    assert path in json.loads(text)["error"]["message"]
    assert not toy.bodies


@pytest.mark.parametrize("path", ADMIN)
def test_what_concerns_all_needs_the_admin_key(path: str) -> None:
    for right, key, code in ((None, "", 403), (None, "x", 403), ("right", "", 403), ("right", "wrong", 403)):
        gate = Gate(Toy(), right)
        gate.frozen = True
        assert ask(gate, path, key=key)[0] == code
    assert ask(Gate(Toy(), ""), "/slow_down", key="")[0] == 403
    assert ask(Gate(Toy(), "right"), path, key="right") == (200, "answered")


def test_sglang_may_freeze_once_by_itself() -> None:
    gate = Gate(Toy())
    assert [ask(gate, "/freeze_gc")[0] for _ in range(3)] == [200, 403, 403]


def test_one_request_can_be_aborted_by_its_id() -> None:
    toy = Toy()
    body = b'{"rid": "abc", "abort_all": false, "abort_message": "x"}'
    assert ask(Gate(toy, running=lambda: ["abc", "xabc"]), "/abort_request", body)[0] == 200
    assert [json.loads(b) for b in toy.bodies] == [{"rid": "abc"}]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"rid": ""}',
        b'{"rid": null}',
        b'{"rid": ["abc"]}',
        b'{"rid": "ab"}',
        b'{"rid": "abc", "abort_all": true}',
        b'{"rid": "abc", "abort_all": "no"}',
        b'{"rid": "' + b"a" * (1 << 17) + b'"}',
        b"[" * (1 << 15),
    ],
)
def test_requests_of_others_are_not_aborted(body: bytes) -> None:
    """SGLang takes an id for all that begin with it, and without one may take all."""
    toy = Toy()
    assert ask(Gate(toy, running=lambda: ["abc", "ab1"]), "/abort_request", body)[0] == 403
    assert not toy.bodies
    assert ask(Gate(toy, "right"), "/abort_request", body, key="right")[0] == 200


def test_a_root_path_is_not_part_of_the_path() -> None:
    gate = Gate(Toy())
    assert ask(gate, "/proxy/generate", root_path="/proxy")[0] == 200
    assert ask(gate, "/proxy/slow_down", root_path="/proxy")[0] == 403
    assert ask(gate, "/proxygenerate", root_path="/proxy")[0] == 404


def test_a_web_socket_is_closed_before_it_opens() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Gate(Toy())({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send))  # type: ignore[arg-type]
    assert [m["type"] for m in sent] == ["websocket.close"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/chat/completions", "top_logprobs is 999; the model has 64 tokens."),
        ("/v1/completions", "logprobs is 999; the model has 64 tokens."),
        ("/v1/responses", "top_logprobs is 999; the model has 64 tokens."),
        ("/generate", "top_logprobs_num is 999; the model has 64 tokens."),
    ],
)
def test_a_field_has_the_name_that_the_client_sent(path: str, said: str) -> None:
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def deeper() -> None:
            heard.append(in_clients_words("top_logprobs_num is 999; the model has 64 tokens."))
            heard.append(in_clients_words("The prompt has no tokens."))

        await asyncio.create_task(deeper())  # as a server answers
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    assert ask(Gate(app), path)[0] == 200
    assert heard == [said, "The prompt has no tokens."]
