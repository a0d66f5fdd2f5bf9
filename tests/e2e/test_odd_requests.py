"""What clients without a key can send: every endpoint of SGLang's, and hundreds of requests that make no sense.

After each group the server answers a prompt as before, and at last SIGTERM ends it.
"""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.odd_requests import Odd, groups
from tests.e2e.servers import Server, left_after, serving
from tests.runtime.routes import sglang_routes

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

KEYS = ("--admin-api-key", "not-to-be-read-anywhere")  # that no request has
METRICS = "--enable-metrics"
PROMPT, NEW = [5, 6, 7, 8], 8
ANSWER_S = 60
GROUPS = groups(sorted(sglang_routes()))


@pytest.fixture(scope="module")
def server(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(compiled, tmp_path_factory.mktemp("odd") / "server.log", METRICS, *KEYS) as s:
        yield s


@pytest.fixture(scope="module")
def reference(server: Server) -> list[int]:
    found: list[int] = server.generate(PROMPT, NEW)["output_ids"]
    return found


def send(port: int, odd: Odd) -> int:
    """The status of the answer; 0 if the client hung up, or the server closed without one."""
    path = odd.path.encode("utf-8", "surrogatepass")
    head = b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as s:
        s.sendall(head % (odd.method.encode(), path, odd.kind.encode(), len(odd.body)) + odd.body)
        seen = b""
        while (odd.cut is None or len(seen) < odd.cut) and (piece := s.recv(65536)):
            seen += piece
    words = seen[:20].split(b" ")
    return int(words[1]) if odd.cut is None and len(words) > 1 and words[1].isdigit() else 0


def test_there_are_enough_of_them() -> None:
    assert sum(map(len, GROUPS.values())) >= 400


@pytest.mark.parametrize("group", GROUPS)
def test_the_server_answers_as_before(server: Server, reference: list[int], group: str) -> None:
    processes = server.processes()
    for odd in GROUPS[group]:
        status = send(server.port, odd)
        shown = f"{odd.method} {odd.path[:80]} {odd.body[:200]!r}: {status}\n{server.log[-2000:]}"
        assert server.process.poll() is None, shown
        assert odd.cut is not None or 100 <= status < 600, shown
    assert server.generate(PROMPT, NEW)["output_ids"] == reference
    assert all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_metrics_count_what_was_generated(server: Server) -> None:
    server.generate(PROMPT, NEW)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    counted = [line for line in text.splitlines() if line.startswith("sglang:generation_tokens_total{")]
    assert sum(float(line.split()[-1]) for line in counted) >= NEW


def test_a_stop_expression_ends_an_answer(server: Server) -> None:
    always_i = {str(ord("I") - 33): 1000.0}  # the tokenizer's first token is "!"
    sampling = {"max_new_tokens": 400, "ignore_eos": True, "logit_bias": always_i, "stop_regex": "[A-Z]{300}$"}
    for length, expression in ((3, "I{3}$"), (400, "[A-Z]{300}$")):  # the second is longer than what is searched
        sampling["stop_regex"] = expression
        reply = json.loads(server.post("/generate", {"input_ids": PROMPT, "sampling_params": sampling}))
        assert reply["text"] == "I" * length


def test_the_key_is_told_to_nobody(server: Server) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/server_info", timeout=30) as reply:
        assert KEYS[1] not in reply.read().decode()
    assert KEYS[1] not in server.log


def test_every_port_is_at_the_loopback(server: Server) -> None:
    found = [c.laddr for p in server.processes() for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert found
    assert {address.ip for address in found} <= {"127.0.0.1", "::1"}


def test_sigterm_ends_it(server: Server, reference: list[int]) -> None:
    assert server.generate(PROMPT, NEW)["output_ids"] == reference
    processes = server.processes()
    server.process.send_signal(signal.SIGTERM)
    assert not left_after(processes, 60)
