"""The whole way once, on real parts: checkpoint, convert, compile, verify, serve, ask, stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from demo.checkpoint import make_checkpoint, zen_lines

WORK = Path("artifacts") / "demo"
CHECKPOINT, ARTIFACT, LOG = WORK / "zen-qwen3", WORK / "zen-qwen3-tp1", WORK / "server.log"
START_TIMEOUT_S = 600  # on a machine with much else to do 218 s were seen
QUESTION = "Beautiful is better than"
OWN = "http://127.0.0.1:30000"  # where `msconv serve` listens if nothing else is said


def main() -> None:
    started = time.monotonic()
    title("1/6", "A checkpoint: a tiny Qwen3ForCausalLM and its tokenizer, trained on the Zen of Python")
    if (CHECKPOINT / "model.safetensors").exists():
        print(f"{CHECKPOINT} is there from an earlier run.")
    else:
        make_checkpoint(CHECKPOINT)
    title("2/6", "Convert: its tensors are cut, fused and written per rank, every byte accounted for")
    msconv("convert", "--model", CHECKPOINT, "--tp", "1", "--output", ARTIFACT, "--force")
    title("3/6", "Compile: MindSpore static graphs, prefill and decode, without weight bytes")
    msconv("compile", ARTIFACT, "--target", "cpu")
    title("4/6", "Verify: the artifact's own graphs and bytes against transformers, logit by logit")
    msconv("verify", ARTIFACT, "--reference", CHECKPOINT)
    title("5/6", "Serve: the real SGLang server, its MindSpore slot filled with the artifact")
    answer, request = serve_and_ask()
    title("6/6", "What happened")
    expected = next(line for line in zen_lines() if line.startswith(QUESTION))
    print(f"asked over HTTP:  {QUESTION}")
    print(f"served answer:    {QUESTION}{answer}")
    print(f"the text says:    {expected}")
    if (QUESTION + answer).strip() != expected.strip():
        sys.exit("The served continuation is not the text's.")
    print(
        f"\nAll of it took {time.monotonic() - started:.0f} s, on this CPU; nothing here has run on an NPU.\n"
        f"The artifact is {ARTIFACT}; look at it with `.venv/bin/msconv inspect {ARTIFACT}`.\n"
        f"To talk to it: `.venv/bin/msconv serve {ARTIFACT} --ui`, and then\n"
        f"  {OWN}/chat\n"
        f"  {request}\n"
        "The page and this request were both tried just now, at another port."
    )


def serve_and_ask() -> tuple[str, str]:
    """Start the server, ask, look at its chat page, stop it by its own process id.  Returns what it answered, and
    the request that it shows, for the usual port."""
    port = free_port()
    command = [sys.executable, "-m", "msconv", "serve", str(ARTIFACT), "--ui", "--port", str(port)]
    print(f"starting; its log is {LOG}")
    with LOG.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_ready(server, port)
        text = LOG.read_text(errors="replace")
        slot = [line for line in text.splitlines() if "type=MindSporeForCausalLM" in line]
        print("the log shows the slot in use:", slot[0].split("] ", 1)[-1] if slot else "no")
        if not slot:
            sys.exit("The server did not use the MindSpore slot.")
        sampling = {"temperature": 0, "max_new_tokens": 16}
        reply = post(port, "/generate", {"text": QUESTION, "sampling_params": sampling})
        return str(reply["text"]), try_what_it_shows(port)
    finally:
        stop(server)


def try_what_it_shows(port: int) -> str:
    """The request and the chat page of the server's own last words: both must work."""
    own = f"http://127.0.0.1:{port}"
    shown = [line.partition("try:")[2].strip() for line in LOG.read_text(errors="replace").splitlines()]
    request = next((line for line in shown if line), "")
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", request], capture_output=True, text=True)
        if done.returncode or "choices" not in done.stdout:
            sys.exit(f"The request that the server shows was not answered: {request}\n{done.stdout}{done.stderr}")
    with urllib.request.urlopen(f"{own}/chat", timeout=10) as reply:
        if b"<title>" not in reply.read():
            sys.exit("The chat page is not there.")
    return request.replace(own, OWN)


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    started = time.monotonic()
    said = 0.0
    while time.monotonic() - started < START_TIMEOUT_S:
        if server.poll() is not None:
            sys.exit(f"The server ended with code {server.returncode}. Its log, {LOG}, ends:\n{tail()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
                if reply.status == 200 and "msconv: ready at" in LOG.read_text(errors="replace"):
                    print(f"ready after {time.monotonic() - started:.0f} s")
                    return
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"  {time.monotonic() - started:3.0f} s: {tail(1)[:100]}", flush=True)
        time.sleep(0.5)
    sys.exit(f"The server was not ready after {START_TIMEOUT_S} s. Its log, {LOG}, ends:\n{tail()}")


def stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    print("server stopped")


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        found: dict[str, Any] = json.loads(reply.read())
        return found


def tail(lines: int = 15) -> str:
    return "\n".join(LOG.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def msconv(*args: object) -> None:
    command = [sys.executable, "-m", "msconv", *map(str, args)]
    print("$ msconv " + " ".join(map(str, args)), flush=True)
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


def title(step: str, text: str) -> None:
    print(f"\n=== {step} {text}", flush=True)


if __name__ == "__main__":
    main()
