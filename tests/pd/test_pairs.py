"""A prefill server, a decode server and SGLang's router on this machine, keys and values by mooncake over TCP.

In an environment that has mooncake and the router, which `make test-pd` makes.
"""

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
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import make_qwen3
from tests.commands import free_port
from tests.conftest import add_tokenizer
from tests.e2e.servers import Server, left_after, make_artifact, serving
from tests.moe_checkpoints import make_deepseek_v3

NEW = 20
LENGTHS = (1, 2, 5, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 120, 3, 9)
PREFIX = 40  # tokens that every fourth prompt begins with

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("mooncake") is None, reason="needs packages of its own: `make test-pd`"),
]


def half(mode: str, bootstrap: int) -> tuple[str, ...]:
    return ("--disaggregation", mode, "--bootstrap-port", str(bootstrap))


@contextmanager
def routing(prefill: Server, bootstrap: int, decode: Server, log_path: Path) -> Iterator[Server]:
    """SGLang's router, as the ready lines of a prefill server have it."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--mini-lb"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--prefill", f"http://127.0.0.1:{prefill.port}", str(bootstrap)]
    command += ["--decode", f"http://127.0.0.1:{decode.port}"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    router = Server(port, process, log_path)
    try:
        for _ in range(240):
            assert process.poll() is None, router.log[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield router
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def make_prompts(vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, vocabulary, n).tolist() for n in LENGTHS]
    return [prompts[13][:PREFIX] + ids if i % 4 == 3 else ids for i, ids in enumerate(prompts)]


def tried(router: Server, ids: list[int], new: int) -> list[int] | int:
    """The tokens, or the status of an error; 0 for an answer that broke off."""
    try:
        found: list[int] = router.generate(ids, new, timeout_s=100)["output_ids"]
        return found
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("qwen3", tmp_path_factory.mktemp("qwen3"))


def made(kind: str, directory: Path, tp: int = 1) -> Path:
    checkpoint = directory / "checkpoint"
    if kind == "qwen3":
        make_qwen3(checkpoint, initializer_range=0.2, max_position_embeddings=512)
        add_tokenizer(checkpoint)
    else:
        make_deepseek_v3(checkpoint)
    return make_artifact(checkpoint, directory / "artifact", tp)


def vocabulary_of(artifact: Path) -> int:
    return int(json.loads((artifact / "config.json").read_text())["vocab_size"])


@pytest.mark.parametrize(("kind", "tp"), [("qwen3", 1), ("deepseek_v3", 1), ("qwen3", 2)])
def test_a_pair_gives_one_servers_tokens(kind: str, tp: int, qwen3: Path, tmp_path: Path) -> None:
    """Sixteen prompts alone and at once, a quarter of which share a prefix.  Of latent attention too, whose cache
    is one array a layer."""
    artifact = qwen3 if (kind, tp) == ("qwen3", 1) else made(kind, tmp_path, tp)
    flags = () if kind == "qwen3" else ("--skip-tokenizer-init",)
    prompts = make_prompts(vocabulary_of(artifact))
    with serving(artifact, tmp_path / "whole.log", *flags) as server:
        wanted = server.answers(prompts, NEW)
        assert server.answers(prompts, NEW, at_once=True) == wanted
    bootstrap = free_port()
    with ExitStack() as stack:
        prefill = stack.enter_context(
            serving(artifact, tmp_path / "prefill.log", *flags, options=half("prefill", bootstrap))
        )
        decode = stack.enter_context(
            serving(artifact, tmp_path / "decode.log", *flags, options=half("decode", bootstrap))
        )
        router = stack.enter_context(routing(prefill, bootstrap, decode, tmp_path / "router.log"))
        assert router.answers(prompts, NEW) == wanted
        assert router.answers(prompts, NEW, at_once=True) == wanted
        assert "--disaggregation decode" in prefill.log and "launch_router" in prefill.log
        for server in (prefill, decode):
            assert server.state()["compiles_since_ready"] == 0
            assert "Traceback" not in server.log, server.log[-3000:]


def test_a_decode_server_that_runs_out_of_room_takes_requests_up_again(qwen3: Path, tmp_path: Path) -> None:
    """Keys and values of a request that is set aside are kept in memory, and put back at other pages."""
    new, room = 200, 1600
    prompts = make_prompts(vocabulary_of(qwen3))[:12]
    with serving(qwen3, tmp_path / "whole.log") as server:
        wanted = server.answers(prompts, new)
    bootstrap = free_port()
    small = ("--max-total-tokens", str(room), "--num-reserved-decode-tokens", "16")
    with ExitStack() as stack:
        prefill = stack.enter_context(serving(qwen3, tmp_path / "prefill.log", options=half("prefill", bootstrap)))
        decode = stack.enter_context(
            serving(qwen3, tmp_path / "decode.log", *small, options=half("decode", bootstrap))
        )
        router = stack.enter_context(routing(prefill, bootstrap, decode, tmp_path / "router.log"))
        assert router.answers(prompts, new, at_once=True) == wanted
        assert "KV cache pool is full. Retract requests" in decode.log


def test_a_killed_prefill_server_gives_errors_and_never_other_tokens(qwen3: Path, tmp_path: Path) -> None:
    prompts = make_prompts(vocabulary_of(qwen3)) * 6
    bootstrap = free_port()
    with ExitStack() as stack:
        decode = stack.enter_context(serving(qwen3, tmp_path / "decode.log", options=half("decode", bootstrap)))
        with serving(qwen3, tmp_path / "prefill.log", options=half("prefill", bootstrap)) as prefill:
            port, processes = prefill.port, prefill.processes()
            router = stack.enter_context(routing(prefill, bootstrap, decode, tmp_path / "router.log"))
            wanted = router.answers(prompts[: len(LENGTHS)], NEW) * 6
            with ThreadPoolExecutor(32) as pool:  # a part at a time: prompts are done long before answers
                asked = [pool.submit(tried, router, ids, NEW) for ids in prompts]
                while sum(future.done() for future in asked) < 8:
                    time.sleep(0.01)
                for process in processes:
                    process.kill()
                got = [future.result() for future in asked]
            assert not left_after(processes, 10)
        failed = [answer for answer in got if isinstance(answer, int)]
        assert len(failed) > 8, "the server was killed too late"
        assert len(failed) < len(got) and all(status in (0, 500) for status in failed)
        assert all(a == b for a, b in zip(got, wanted, strict=True) if not isinstance(a, int))
        assert tried(router, prompts[3], NEW) == 500
        assert decode.status("/health", {}) in (200, 405) and decode.process.poll() is None
        # another prefill server in its place: the same decode server goes on
        with serving(qwen3, tmp_path / "again.log", options=half("prefill", bootstrap), port=port):
            assert [tried(router, ids, NEW) for ids in prompts[:4]] == wanted[:4]


def test_servers_of_different_artifacts_move_nothing(qwen3: Path, tmp_path: Path) -> None:
    """Another checkpoint of the same shape would fit byte for byte; pages of another size would not.  The client
    is told, and the decode server goes on."""
    make_qwen3(tmp_path / "other", initializer_range=0.2, max_position_embeddings=512, seed=7)
    add_tokenizer(tmp_path / "other")
    other = make_artifact(tmp_path / "other", tmp_path / "artifact")
    bootstrap = free_port()
    with serving(qwen3, tmp_path / "prefill.log", options=half("prefill", bootstrap)):
        for artifact, flags, said in (
            (other, (), "another artifact: weights"),
            (qwen3, ("--page-size", "32"), "Page size mismatch"),
        ):
            with serving(artifact, tmp_path / "decode.log", *flags, options=half("decode", bootstrap)) as decode:
                for room in (1, 2):
                    told = refused(decode, bootstrap, room)
                    assert said in told and f"prefill server at 127.0.0.1:{bootstrap}" in told
                assert decode.process.poll() is None
                assert "Traceback" not in decode.log


def refused(decode: Server, bootstrap: int, room: int) -> str:
    """What a decode server answers to a request that a router has given a prefill server."""
    routed = {"bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap, "bootstrap_room": room}
    try:
        found = decode.generate([5, 6, 7], NEW, **routed)
    except urllib.error.HTTPError as e:
        return e.read().decode()
    pytest.fail(f"the decode server answered {found}")
