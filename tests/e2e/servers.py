"""Real SGLang servers on real artifacts: loopback only, bounded, ended by their own process id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.commands import free_port
from tests.warm import run_warm

START_TIMEOUT_S = 240
NEW_TOKENS = 20


@dataclass
class Server:
    """A running server.  `log` is everything it printed."""

    port: int
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """The server's main process and all it started."""
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def state(self) -> dict[str, Any]:
        """What /server_info says of the artifact."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/server_info", timeout=30) as reply:
            found: dict[str, Any] = json.loads(reply.read())["internal_states"][0]["msconv"]
        return found

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            found: bytes = reply.read()
        return found

    def status(self, path: str, body: dict[str, Any], key: str = "", timeout_s: float = 60) -> int:
        """The status of an answer to a request with this bearer token."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as e:
            return e.code

    def generate(self, ids: list[int], max_new_tokens: int, timeout_s: float = 120, **more: Any) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        reply: dict[str, Any] = json.loads(
            self.post("/generate", {"input_ids": ids, "sampling_params": sampling, **more}, timeout_s)
        )
        return reply

    def answers(self, prompts: list[list[int]], new: int, at_once: bool = False) -> list[list[int]]:
        """Generated tokens of each, asked one after another or all at once."""
        with ThreadPoolExecutor(len(prompts) if at_once else 1) as pool:
            return list(pool.map(lambda ids: self.generate(ids, new)["output_ids"], prompts))


def left_after(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Which of them still run when the time is over.  Returns at once when none does."""
    deadline = time.monotonic() + seconds
    while True:
        left = [p for p in processes if _runs(p)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def expected(model: Any, ids: list[int], new: int = NEW_TOKENS) -> list[int]:
    """transformers' greedy continuation."""
    import torch

    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),  # else every pad id in the prompt is hidden
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    found: list[int] = out[0, len(ids) :].tolist()
    return found


@contextmanager
def serving(
    artifact: Path,
    log_path: Path,
    *sglang_args: str,
    options: tuple[str, ...] = (),
    port: int = 0,
    start_s: float = START_TIMEOUT_S,
) -> Iterator[Server]:
    """`msconv serve`, with more of its own `options`, on a free port or this one, until the block ends."""
    port = port or free_port()
    own = [str(artifact), "--port", str(port), *options]
    command = [sys.executable, "-m", "msconv", "serve", *own, "--", *sglang_args]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(port, process, log_path)
    try:
        _wait(server, start_s)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(server: Server, start_s: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            pytest.fail(f"the server ended with {server.process.returncode}:\n{server.log[-3000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server was not ready after {start_s} s:\n{server.log[-3000:]}")


def make_artifact(checkpoint: Path, root: Path, tp: int = 1, ep: int = 1) -> Path:
    """The checkpoint converted and compiled for the CPU."""
    run("convert", "--model", checkpoint, "--tp", tp, "--ep", ep, "--output", root)
    run("compile", root, "--target", "cpu")
    return root


def run(*args: object) -> None:
    """A msconv command that must succeed."""
    done = run_warm(*args, timeout=600)
    assert done.code == 0, done.stderr
