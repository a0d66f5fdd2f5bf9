"""The lines that the pages show, typed one after the other as printed.

There is a hub on localhost that has small random models under the published names, directories of such models, and
a directory in the place of /data.  `make test-walks` runs them.  Always held: every line that a page shows is in a
walk, or is run by another test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoints import edit_json, make_qwen3
from tests.commands import Result, free_port, run_msconv
from tests.conftest import add_tokenizer
from tests.docs.pages import PAGES, ROOT, blocks, commands
from tests.docs.test_pages import example
from tests.hub.server import Hub
from tests.moe_checkpoints import make_deepseek_v3

NPU = ("--device", "npu", "--print-command")  # a line for a host with NPUs: up to the command that it would become
PRINTED = ("--print-command",)

LAPTOP = (
    "msconv convert Qwen3-0.6B",
    "msconv compile",
    "msconv verify",
    "msconv serve --ui",
    "msconv serve artifacts/Qwen3-0.6B-tp1 --port 30000",
    "msconv serve artifacts/Qwen3-0.6B-tp1 --ui",
    "msconv serve artifacts/Qwen3-0.6B-tp1 -- --max-total-tokens 8192 --log-level debug",
    "msconv verify artifacts/Qwen3-0.6B-tp1 --reference models/Qwen3-0.6B",
)
CLUSTER = (
    "msconv convert Qwen3-8B",
    "msconv compile --target ascend910b",
    "msconv verify --target ascend910b",
    "msconv serve --recipe Qwen3-8B",
    "msconv inspect artifacts/Qwen3-8B-tp4",
    "msconv inspect artifacts/Qwen3-8B-tp4 --check",
    "msconv doctor artifacts/Qwen3-8B-tp4",
    "msconv report artifacts/Qwen3-8B-tp4",
    "msconv report artifacts/Qwen3-8B-tp4 --output Qwen3-8B.html",
    "msconv reshard artifacts/Qwen3-8B-tp4 --tp 2",
    "msconv reshard artifacts/Qwen3-8B-tp4 --tp 8 --output artifacts/Qwen3-8B-tp8",
    "msconv compile artifacts/Qwen3-8B-tp4 --recipe Qwen3-8B",
    "msconv verify artifacts/Qwen3-8B-tp4 --target ascend910b",
    "msconv push artifacts/Qwen3-8B-tp4 --to me/Qwen3-8B-tp4",
    "msconv push artifacts/Qwen3-8B-tp4 --to me/Qwen3-8B-tp4 --private --check",
    "msconv sign artifacts/Qwen3-8B-tp4 --key me.pem",
    "msconv push artifacts/Qwen3-8B-tp4 --to me/Qwen3-8B-tp4 --sign me.pem",
    "msconv pull me/Qwen3-8B-tp4@main --output out",
    "msconv inspect artifacts/Qwen3-8B-tp4 --require-signature me.pub",
    "msconv serve artifacts/Qwen3-8B-tp4 --require-signature me.pub",
    "cp -r artifacts/Qwen3-8B-tp4 /data/",
    "msconv inspect /data/Qwen3-8B-tp4 --check",
    "msconv inspect /data/Qwen3-8B-tp4 --json",
    "msconv doctor /data/Qwen3-8B-tp4",
    "msconv doctor /data/Qwen3-8B-tp4 --json",
    "msconv serve /data/Qwen3-8B-tp4 --device npu --print-command",
    "msconv serve /data/Qwen3-8B-tp4 --recipe Qwen3-8B --device npu",
    "msconv serve /data/Qwen3-8B-tp4 --device npu -- --log-level debug 2>&1",
    "msconv serve /data/Qwen3-8B-tp4 --recipe Qwen3-8B --host 0.0.0.0 -- --api-key KEY --admin-api-key OTHER",
    "rm -r artifacts/Qwen3-8B-tp4",
    "msconv pull me/Qwen3-8B-tp4 --require-signature me.pub",
    "rm -r artifacts/Qwen3-8B-tp4",
    "msconv pull me/Qwen3-8B-tp4",
    "rm -r artifacts/Qwen3-8B-tp4",
    "msconv convert --model Qwen3-8B --output artifacts/Qwen3-8B-tp4",
)
DIRECTORIES = (
    "msconv recipes",
    "msconv recipes Qwen3-8B",
    "msconv recipes DeepSeek-R1",
    "msconv recipes ./my-deployment.yaml --json",
    "msconv completion zsh",
    "msconv completion fish",
    "msconv doctor",
    "msconv plan --model Qwen3-8B",
    "msconv plan Qwen3-32B",
    "msconv plan --model Qwen3-32B --tp 8 --context 16384 --batch 64 --device-memory 64G",
    "msconv plan models/Qwen3-32B --tp 8",
    "msconv plan --model models/Qwen3-32B --tp 4 --context 32768 --batch 8 --device-memory 64G",
    "msconv lint models/Qwen3-8B --json",
    "msconv lint Qwen/Qwen3-8B",
    "msconv convert --model Qwen3-8B",
    "msconv convert Qwen3-8B --tp 2",
    "msconv convert --model models/Qwen3-8B --tp 8 --dtype float16 --output out",
    "msconv convert --model models/mine --tp 4 --harmless my_note --harmless rope_scaling.comment",
    "msconv convert --model models/DeepSeek-V3 --tp 16 --ep 16",
    "msconv plan DeepSeek-R1 --quant w8a8 --tp 16 --ep 16",
    "msconv convert DeepSeek-R1 --quant w8a8 --tp 16 --ep 16",
    "rm -r artifacts",
    "msconv convert models/Qwen3-8B --tp 4",
    "rm -r artifacts",
    "msconv convert --model models/Qwen3-8B --recipe Qwen3-8B",
    "rm -r artifacts",
    "msconv convert --model Qwen3-8B --tp 2",
    "msconv compile --model models/Qwen3-32B --tp 8 --target ascend910b --output graphs-only",
    "msconv convert --model models/Qwen3-32B --tp 8 --output graphs-only",
)
WALKS = {"laptop": LAPTOP, "cluster": CLUSTER, "directories": DIRECTORIES}
ELSEWHERE = {  # by a pattern of lines: why no walk has them
    r"\[OPTIONS\]": "a usage line",
    r"tiny-(dots1|hop|qwen3|int8)|artifacts/resharded": "the pages about adding something are followed whole",
    r"msconv rehearse ": "tests/rehearsal",
    r"--speculative-algorithm": "tests/e2e/test_drafts.py",
    r"--source modelscope": "tests/hub/test_kinds.py",
    r"--nnodes 4": "four machines: tests/e2e/test_parallel.py and tests/rehearsal start two",
    r"DeepSeek-R1-W8A8|DeepSeek-R1-tp16-ep16": "tests/quant and tests/lint, on ModelSlim's form and on int8",
    r"--target onnx": "tests/onnx_files",
    r"--engine vllm": "tests/vllm_engine",
    r"--disaggregation ": "tests/pd",
    r"--roofline ": "tests/roofline",
    r"--predict": "tests/cli/test_predict.py",
    r"--fuse ": "tests/verify/test_fused.py",
    r"s3://": "tests/storage, on stores on localhost",
    r"--ray |/shared/": "tests/ray",
    r"artifacts/(draft|qwen3)\b": "tests/e2e/test_hidden_drafts.py",
    r"convert DeepSeek-V3( --no-drafts)?$": "tests/layout and tests/stream, on models with such layers",
    r"msconv plan DeepSeek-R1$": "256 experts over 32 ranks: tests/cli/test_recipes.py plans every recipe",
    r"--target ascend910b --target cpu": "tests/verify/test_prove.py compiles for both",
    r"\bARTIFACT\b": "written with a word for the reader's own",
    r"msconv (verify|serve) artifact ": "what is seen, not what is typed",
}


def test_every_line_that_is_shown_is_in_a_walk_or_runs_elsewhere() -> None:
    shown = {" ".join(example(line).split()) for page in PAGES for line in commands(page.read_text())}
    walked = {line for walk in WALKS.values() for line in walk if line.startswith("msconv ")}
    assert walked - shown == set(), "no page shows these any more"
    left = {line for line in shown - walked if not any(re.search(p, line) for p in ELSEWHERE)}
    assert left == set(), "shown, and run by nothing"
    unused = [p for p in ELSEWHERE if not any(re.search(p, line) for line in shown)]
    assert unused == []


@dataclass(frozen=True)
class Stage:
    """An empty directory, and what stands for /data."""

    here: Path
    data: Path

    def type(self, line: str) -> Result:
        """A line, as it is printed but for /data; one that would start a server of an NPU is only printed."""
        words = shlex.split(line.replace("/data/", f"{self.data}/").replace("2>&1", ""))
        if words[0] != "msconv":
            subprocess.run(words, cwd=self.here, check=True)
            return Result(0, "", "")
        if words[1] == "serve":
            own, dashes, theirs = (words, [], []) if "--" not in words else _at_dashes(words)
            kind = NPU if "Qwen3-8B" in line else PRINTED
            more = [w for w in kind if w not in own]
            words = [*own, *more, *dashes, *theirs]
        done = run_msconv(*words[1:], cwd=self.here, timeout=900)
        allowed = {0, 4} if words[1] == "doctor" else {0}  # this machine need not be able to serve for an NPU
        assert done.code in allowed, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done


def _at_dashes(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    at = words.index("--")
    return words[:at], ["--"], words[at + 1 :]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models under the names that the pages use."""
    root = tmp_path_factory.mktemp("models")
    options = {"num_hidden_layers": 2, "num_key_value_heads": 8, "dtype": "bfloat16"}
    for name, seed in (("Qwen3-0.6B", 1), ("Qwen3-8B", 2), ("Qwen3-32B", 3), ("mine", 4)):
        add_tokenizer(make_qwen3(root / name, seed=seed, max_position_embeddings=40960, **options))
    scaling = {"rope_type": "default", "rope_theta": 10000.0, "comment": "as trained"}
    edit_json(root / "mine" / "config.json", my_note="ours", rope_scaling=scaling, rope_parameters=None)
    make_deepseek_v3(root / "DeepSeek-V3", num_attention_heads=16, num_key_value_heads=16, dtype="bfloat16")
    return root


@pytest.fixture
def stage(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """An empty directory with what the pages suppose: models/, a key pair by openssl, a recipe; and the hub."""
    here, data = tmp_path / "here", tmp_path / "data"
    here.mkdir()
    data.mkdir()
    (here / "models").symlink_to(models)
    shutil.copy(ROOT / "recipes" / "Qwen3-8B.yaml", here / "my-deployment.yaml")
    make_the_keys_of_the_page(here)
    hub = Hub()
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B"):
        hub.add(name, models / name.partition("/")[2])
    hub.add("deepseek-ai/DeepSeek-R1", models / "DeepSeek-V3")
    hub.home = tmp_path / "hub"
    for key in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # that hub does not offer it
    yield Stage(here, data)
    hub.stop()


def make_the_keys_of_the_page(here: Path) -> None:
    """By the lines of docs/artifact.md."""
    lines = [
        line
        for block in blocks((ROOT / "docs" / "artifact.md").read_text())
        for line in block.text.splitlines()
        if line.startswith("openssl ")
    ]
    assert len(lines) == 2
    for line in lines:
        subprocess.run(["sh", "-euc", line], cwd=here, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("MSCONV_WALKS"), reason="some minutes of commands: `make test-walks`")
@pytest.mark.parametrize("walk", WALKS)
def test_a_walk(walk: str, stage: Stage) -> None:
    for line in WALKS[walk]:
        done = stage.type(line)
        if line == "msconv serve --ui":
            serves_for_a_while(stage, line)
        if line.startswith(("msconv serve", "msconv recipes", "msconv plan", "msconv completion")):
            assert done.stdout, line


def serves_for_a_while(stage: Stage, line: str) -> None:
    """A server that is really started, at a port that is free: its page answers, and the line behind `try:` works
    when it is pasted."""
    words = [*shlex.split(line)[1:], "--port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "msconv", *words],
        cwd=stage.here,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = ""
    try:
        assert process.stdout
        for out in process.stdout:
            said += out
            if "proof:" in out:
                break
        found = dict(re.findall(r"^ *(try|chat|proof): +(.+)$", said, re.M))
        assert set(found) == {"try", "chat", "proof"}, said[-3000:]
        for name in ("chat", "proof"):
            with urllib.request.urlopen(found[name], timeout=30) as reply:
                assert reply.status == 200
        pasted = subprocess.run(["sh", "-euc", found["try"]], capture_output=True, text=True, timeout=120)
        assert json.loads(pasted.stdout)["usage"]["completion_tokens"] > 0, pasted.stdout + pasted.stderr
    finally:
        process.terminate()
        process.communicate(timeout=60)
