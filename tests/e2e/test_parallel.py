"""Artifacts of several ranks: the real SGLang server on a CPU, one process a rank, against transformers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from msconv_runtime import mccl
from msconv_runtime.errors import EnvironmentProblem
from msconv_runtime.serving.launch import plan_launch
from msconv_runtime.sglang.environment import cores_by_rank, cpu_environment
from tests.e2e import logprobs
from tests.e2e.servers import NEW_TOKENS, Server, expected, left_after, make_artifact, serving
from tests.every import one_of_many

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

CHUNK = 64
KEY = "of-the-administrator"
END_S = 15  # after this no process of a server may be left


@pytest.fixture(scope="module")
def artifact(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(random_checkpoint, tmp_path_factory.mktemp("serve-tp2") / "artifact", tp=2)


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    """Shared; the last test that asks for it kills one of its processes."""
    log = artifact.with_name("server.log")
    flags = ("--chunked-prefill-size", str(CHUNK), "--skip-tokenizer-init", "--admin-api-key", KEY)
    with serving(artifact, log, *flags) as s:
        yield s


def process_of(processes: list[psutil.Process], words: str) -> psutil.Process:
    (found,) = [p for p in processes if words in " ".join(p.cmdline())]
    return found


def test_every_rank_runs_the_slot_and_the_graphs_own_collectives(server: Server) -> None:
    log = server.log
    for rank in range(2):
        assert f"TP{rank}] msconv: rank {rank} of 2: mccl started" in log
        assert f"TP{rank}] msconv: groups ['msconv_tp'] created over ranks [0, 1]" in log
    assert log.count("mixed_compiled and verify_compiled warmed up") == 2
    assert process_of(server.processes(), "msconv_runtime.mccl").is_running()


@pytest.mark.parametrize("at_once", [False, True])
def test_prompts_give_transformers_tokens(
    server: Server, model: Any, prompts: list[list[int]], at_once: bool
) -> None:
    assert server.answers(prompts, NEW_TOKENS, at_once) == [expected(model, ids) for ids in prompts]


def test_a_cached_prefix_and_a_prompt_of_many_chunks(server: Server, model: Any) -> None:
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, 7 * CHUNK + 5).tolist()
    longer = [*ids, 3, 1, 4]
    first, second = server.generate(ids, NEW_TOKENS), server.generate(longer, NEW_TOKENS)
    assert second["meta_info"]["cached_tokens"] > 0
    assert first["output_ids"] == expected(model, ids)
    assert second["output_ids"] == expected(model, longer)


def test_every_port_is_at_the_loopback(server: Server) -> None:
    """Torch's store, Gloo's groups, MindSpore's scheduler and ranks: nobody else can reach them."""
    listening = {
        p.pid: {c.laddr.ip for c in p.net_connections("inet") if c.status == "LISTEN"} for p in server.processes()
    }
    found = set().union(*listening.values())
    assert len([ips for ips in listening.values() if ips]) > 1  # the ranks meet somewhere
    assert found <= {"127.0.0.1", "::1"}, listening


def test_what_concerns_everybody_needs_the_administrators_key(server: Server) -> None:
    ids = [5, 6, 7, 8]
    before = server.generate(ids, 4)["output_ids"]
    for path, key in (("/pause_generation", ""), ("/pause_generation", "wrong"), ("/slow_down", "")):
        assert server.status(path, {"mode": "retract"}, key) == 403
    assert server.generate(ids, 4)["output_ids"] == before
    assert server.status("/update_weights_from_disk", {"model_path": "/"}, KEY) == 400  # with any key
    with ThreadPoolExecutor(1) as pool:
        assert server.status("/pause_generation", {"mode": "retract"}, KEY) == 200
        waiting = pool.submit(server.generate, ids, 4)
        time.sleep(2)
        assert not waiting.done()
        assert server.status("/continue_generation", {}, KEY) == 200
        assert waiting.result(60)["output_ids"] == before
    assert KEY not in server.log


def test_log_probabilities_of_prompts(server: Server, model: Any, prompts: list[list[int]]) -> None:
    asked = [(ids, start) for ids in prompts for start in (0, len(ids) - 1)]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(server.generate, ids, NEW_TOKENS) for ids in prompts[:4]]
        answers = list(pool.map(lambda one: logprobs.ask(server, *one), asked))
    for (ids, start), answer in zip(asked, answers, strict=True):
        logprobs.check(model, ids, start, answer)
    assert [o.result()["output_ids"] for o in others] == [expected(model, ids) for ids in prompts[:4]]


def test_a_rank_killed_in_mid_request_ends_the_server(server: Server) -> None:
    processes = server.processes()
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(server.generate, [5, 6, 7], 1900)
        time.sleep(1)
        process_of(processes, "sglang::scheduler_TP1").kill()
        assert left_after(processes, END_S) == []
        assert request.exception(END_S) is not None
    assert "SIGQUIT received" in server.log  # from SGLang's watchdog, or from a rank that missed the other first


@one_of_many("test-servers")
def test_the_same_artifact_starts_again_and_sigterm_leaves_no_process(artifact: Path) -> None:
    with serving(artifact, artifact.with_name("again.log"), "--skip-tokenizer-init") as server:
        processes = server.processes()
        assert len(server.generate([1, 2, 3], 2)["output_ids"]) == 2
        server.process.send_signal(signal.SIGTERM)
        assert left_after(processes, END_S) == []
    assert server.process.wait() == 0


# Stands for the server's main process: SIGQUIT is how SGLang's ranks tell it that they failed.
MAIN = """
import signal, subprocess, sys, threading
told = threading.Event()
signal.signal(signal.SIGQUIT, lambda *_: told.set())
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print("told" if told.wait(60) else "not told", flush=True)
rank.kill()
"""
RANK_0 = """
import time
from msconv_runtime import mccl
print(mccl.start_scheduler(2, "127.0.0.1"), flush=True)
time.sleep(90)
"""


def test_a_lost_scheduler_ends_the_server() -> None:
    command = [sys.executable, "-c", MAIN, RANK_0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        assert int(main.stdout.readline()) > 0
        process_of(psutil.Process(main.pid).children(recursive=True), "msconv_runtime.mccl").kill()
        out, err = main.communicate(timeout=70)
    assert out == "told\n"
    assert "MindSpore's scheduler" in err
    assert "ended with -9" in err


def test_the_scheduler_ends_with_rank_0() -> None:
    with subprocess.Popen([sys.executable, "-c", RANK_0], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert int(rank.stdout.readline()) > 0
        scheduler = process_of(psutil.Process(rank.pid).children(), "msconv_runtime.mccl")
        rank.kill()
    assert left_after([scheduler], 5) == []


def test_a_scheduler_that_cannot_start_is_named_with_what_it_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mccl.sys, "executable", "/bin/cat")  # does not know -m
    with pytest.raises(EnvironmentProblem, match=r"ended with 1.*invalid option"):
        mccl.start_scheduler(2, "127.0.0.1")


def test_the_command_names_the_layout_and_the_cores(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    launch = plan_launch(artifact, "cpu", "127.0.0.1", 30000, [])
    assert launch.argv[launch.argv.index("--tp-size") + 1] == "2"
    assert "--ep-size" not in launch.argv
    assert "--sleep-on-idle" in launch.argv
    assert launch.environment["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "3|4")
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in plan_launch(artifact, "cpu", "127.0.0.1", 30000, []).environment


@pytest.mark.parametrize(
    ("cores", "tp", "wanted"),
    [
        ([0, 1], 2, "0|1"),
        ([0, 1], 4, "0|1|0|1"),
        ([3], 2, "3|3"),
        ([0, 1, 2], 2, "0|1"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 2, "0,1,2,3|4,5,6,7"),
    ],
)
def test_cores_are_shared_out(cores: list[int], tp: int, wanted: str) -> None:
    assert cores_by_rank(cores, tp) == wanted


def test_a_server_of_another_layout_is_refused_with_all_that_differs(artifact: Path) -> None:
    code = f"""
from pathlib import Path
from types import SimpleNamespace
from msconv_runtime.artifact import Artifact
from msconv_runtime.sglang import slot
server = SimpleNamespace(
    tp_size=4, moe_ep_size=2, pp_size=1, moe_dp_size=1, attn_dp_size=1, attn_cp_size=1, tp_rank=3
)
slot.get_parallel = lambda: server
root = Path({str(artifact)!r})
try:
    slot.check_parallel(Artifact(root))
except slot.EnvironmentProblem as e:
    print(e.message)
server.tp_size, server.moe_ep_size, server.tp_rank = 2, 1, 1
print(slot.check_parallel(Artifact(root)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **cpu_environment()}
    )
    message, rank = done.stdout.splitlines()[-2:]
    assert "converted for tp 2, ep 1; the server runs --tp-size 4, not 2; --ep-size 2, not 1" in message
    assert rank == "1"
