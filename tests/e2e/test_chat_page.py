"""What a served model shows of itself: its address, a request that works, its proof, the chat page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.servers import Server, make_artifact, serving
from tests.report.browser import Browser, contrast, open_browser
from tests.served_models import random_qwen3
from tests.warm import run_warm

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

KEY = "a-key"


TOKENIZER = Path(__file__).parents[1] / "format1" / "qwen3"  # words, and a chat template
EOS = 2


def make_checkpoint(directory: Path) -> Path:
    """A model of random weights that goes on as long as it may: its end has no logit to speak of."""
    import torch

    model = random_qwen3(64, eos_token_id=EOS)
    torch.nn.init.zeros_(model.lm_head.weight.data[EOS])
    model.save_pretrained(directory)
    for path in TOKENIZER.glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("chat")
    artifact = make_artifact(make_checkpoint(root / "random-qwen3"), root / "artifact")
    assert run_warm("verify", artifact).code == 0
    with serving(artifact, root / "server.log", "--api-key", KEY, options=("--ui",)) as s:
        until(lambda: "msconv: ready at" in s.log)
        yield s


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def until(done: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def get(server: Server, path: str, key: str = "") -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def line(server: Server, name: str) -> str:
    found = re.search(rf"^  {name}: +(.+)$", server.log, re.M)
    assert found
    return found[1]


def test_the_request_that_a_server_shows_can_be_pasted(server: Server) -> None:
    assert f"msconv: ready at http://127.0.0.1:{server.port}\n" in server.log
    shown = line(server, "try")
    assert KEY not in shown
    assert shutil.which("curl")
    done = subprocess.run(["sh", "-c", f"API_KEY={KEY}; {shown}"], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["model"] == "random-qwen3"
    assert answer["choices"][0]["message"]["content"]
    assert "chat/completions" in shlex.split(shown)[1]


def test_a_server_says_what_was_proved_to_whoever_may_ask(server: Server) -> None:
    assert get(server, "/msconv/proof")[0] == 401
    assert get(server, "/msconv/proof", "wrong")[0] == 401
    code, body = get(server, "/msconv/proof", KEY)
    proof = json.loads(body)
    assert code == 200
    assert (proof["model"], proof["target"]) == ("random-qwen3", "cpu")
    assert 0 < proof["proven"]["max_abs_logit_error"] < proof["proven"]["bound"]
    assert proof["proven"]["checked_here"] is True
    assert proof["rounding_kernels"] == ""
    assert line(server, "proof") == f"http://127.0.0.1:{server.port}/msconv/proof"


def opened(browser: Browser, server: Server, scheme: str = "light", width: int = 1280) -> None:
    browser.visit(line(server, "chat"), scheme, width)
    until(lambda: "API key" in browser.run("return document.getElementById('model').textContent"))
    browser.run(
        "const key = document.getElementById('key'); key.value = arguments[0];"
        "key.dispatchEvent(new Event('change'))".replace("arguments[0]", repr(KEY))
    )
    until(lambda: browser.run("return document.getElementById('model').textContent") == "random-qwen3")


def send(browser: Browser, text: str) -> None:
    """Typed and sent as a person does."""
    box = browser.driver.find_element("id", "text")
    box.send_keys(text)
    box.send_keys("\n")


def speed(browser: Browser) -> str:
    found = browser.run("return [...document.querySelectorAll('.speed')].at(-1)?.textContent || ''")
    return str(found)


def test_a_question_is_answered_in_a_stream(browser: Browser, server: Server) -> None:
    opened(browser, server)
    assert "proven against transformers, largest logit error" in browser.run(
        "return document.getElementById('proof').textContent"
    )
    browser.run("document.getElementById('most').value = 40")
    send(browser, "word3 word4 word5 word6")
    until(
        lambda: re.search(r"\d+ tokens in, \d+ tokens out, first after [\d.]+ s, [\d.]+ tokens/s", speed(browser))
    )
    said = browser.run("return [...document.querySelectorAll('.turn')].map(e => e.className)")
    assert said == ["turn user", "turn assistant"]
    assert browser.run("return document.querySelector('.assistant .said').textContent.length") > 20
    send(browser, "word7")  # the conversation goes on
    until(lambda: browser.run("return document.querySelectorAll('.turn').length") == 4)
    until(lambda: "tokens in" in speed(browser))
    asked = [url for url in browser.requests() if re.match(r"(http|ws|ftp)", url)]  # its own tab is chrome://
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith(f"http://127.0.0.1:{server.port}/")] == []
    refused = [e for e in browser.console() if "401" not in e["message"]]  # before the key was typed
    assert refused == []


def test_an_answer_can_be_stopped(browser: Browser, server: Server) -> None:
    opened(browser, server)
    browser.run("document.getElementById('most').value = 1900; document.getElementById('temperature').value = 0")
    send(browser, "word3 word4 word5")
    until(lambda: "tokens out" in speed(browser))
    browser.run("document.getElementById('stop').click()")
    until(lambda: browser.run("return document.getElementById('stop').hidden"))
    assert "stopped" in speed(browser)
    until(lambda: b'"num_running_reqs":0' in get(server, "/v1/loads", KEY)[1].replace(b" ", b""))


def test_what_a_model_says_is_text_and_no_page(browser: Browser, server: Server) -> None:
    opened(browser, server)
    evil = "<think>hm</think><img src=x onerror=window.alerted=1>\\n```js\\nlet a = 1\\n``` after"
    browser.run(
        f"const place = document.createElement('div'); render(place, '{evil}'); document.body.append(place)"
    )
    assert browser.run("return typeof window.alerted") == "undefined"
    assert browser.run("return document.images.length") == 0
    assert browser.run("return document.body.lastChild.querySelector('pre').textContent") == "let a = 1\n"
    assert browser.run("return document.body.lastChild.querySelector('details').open") is False


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_can_be_read_in_any_light_on_any_screen(
    browser: Browser, server: Server, scheme: str, width: int, tmp_path: Path
) -> None:
    opened(browser, server, scheme, width)
    browser.run("document.getElementById('most').value = 24; document.querySelector('details').open = true")
    send(browser, "word3 word4 word5 word6")
    until(lambda: "tokens in" in speed(browser))
    (tmp_path / "page.png").write_bytes(browser.screenshot())
    assert browser.run("return document.documentElement.scrollWidth") <= width
    top = "document.getElementById('{}').getBoundingClientRect().top"
    apart = browser.run(f"return {top.format('model')} - {top.format('anew')}")
    assert abs(apart) < 20, "the name and the button share a line"
    texts = browser.texts()
    assert len(texts) > 8
    assert [(t, contrast(ink, paper)) for t, ink, paper in texts if contrast(ink, paper) < 4.5] == []
    named = {
        name for role, name in browser.accessible() if role in ("textbox", "button", "spinbutton", "combobox")
    }
    assert {"Message", "Send", "New chat", "Temperature", "Mode"} <= {n.split("\n")[0].strip() for n in named}


def test_without_ui_there_is_no_page() -> None:
    import asyncio
    from typing import Any

    from msconv_runtime.serving.pages import Pages

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def ask(pages: Pages, path: str, method: str = "GET") -> int:
        sent: list[Any] = []

        async def keep(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": []}
        asyncio.run(pages(scope, None, keep))  # type: ignore[arg-type]
        return int(sent[0]["status"])

    assert ask(Pages(app, {}), "/chat") == 404
    assert ask(Pages(app, {}), "/msconv/proof") == 200
    assert ask(Pages(app, {}, ui=True), "/chat") == 200
    assert ask(Pages(app, {}, ui=True), "/chat/script.js") == 200
    assert ask(Pages(app, {}, ui=True), "/chat/../proof.py") == 404
    assert ask(Pages(app, {}, ui=True), "/chat", "POST") == 404
