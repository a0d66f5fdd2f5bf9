"""SGLang's flags with an artifact: tried, refused before anything loads, or passed on with a word."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msconv_runtime.artifact import Artifact
from msconv_runtime.doctor import Machine
from msconv_runtime.doctor.machine import installed
from msconv_runtime.errors import ArtifactError, EnvironmentProblem, UsageError
from msconv_runtime.serving import preflight
from msconv_runtime.serving.launch import plan_launch
from msconv_runtime.sglang.accepted import REFUSED, TRIED, flag_problems, untried
from msconv_runtime.sglang.configuration import COMPUTED, refuse_other
from msconv_runtime.sglang.environment import cpu_environment
from msconv_runtime.sglang.keys import HIDDEN, hide_fields, hide_words
from tests.commands import run_msconv, run_python

PARSER = """
import argparse, json
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(json.dumps([s for a in parser._actions for s in a.option_strings if s.startswith("--")]))
"""


@pytest.fixture(scope="module")
def of_sglang() -> list[str]:
    """Every flag of the installed SGLang."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cpu_environment().items():
            patch.setenv(name, value)
        done = run_python(PARSER)
    assert done.code == 0, done.stderr[-2000:]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def launch(artifact: Path, *extra: str) -> Any:
    return plan_launch(artifact, "cpu", "127.0.0.1", 30000, list(extra))


def test_the_tables_name_flags_that_there_are(of_sglang: list[str]) -> None:
    shortened = {"--tp", "--ep", "--dp"}
    assert TRIED - shortened <= set(of_sglang)
    named = {name for refused in REFUSED for name in refused.names.split()}
    missing = {n for n in named if not any(f.startswith(n[:-1]) if n.endswith("*") else f == n for f in of_sglang)}
    assert missing == set()


def test_no_whole_flag_is_taken_for_a_shortened_one(of_sglang: list[str]) -> None:
    said = [p for flag in of_sglang for p in flag_problems({flag: "x"}) if "in full" in p]
    assert said == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--is-embedding",),
        ("--enable-lora",),
        ("--lora-paths", "/x"),
        ("--speculative-algorithm", "EAGLE"),
        ("--quantization", "fp8"),
        ("--kv-cache-dtype", "fp8_e5m2"),
        ("--pipeline-parallel-size", "2"),
        ("--pp-size=2",),
        ("--model-impl", "transformers"),
        ("--load-format", "dummy"),
        ("--enable-torch-compile",),
        ("--model", "/elsewhere"),
        ("--config", "flags.yaml"),
        ("--trust-remote-code",),
        ("--tokenizer-worker-num", "4"),
        ("--grpc-port", "5"),
        ("--json-model-override", "{}"),
        ("--speculative-algo", "EAGLE"),
        ("--is-emb",),
        ("--json-model-override-args", '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}'),
        ("--json-model-override-args", '{"hidden_size": 65}'),
        ("--json-model-override-args", "{"),
        ("--json-model-override-args", "3"),
        ("--json-model-override-args", '{"no_such_key": 1}'),
        ("--json-model-override-args", '{"tie_word_embeddings": 0}'),
    ],
    ids=" ".join,
)
def test_what_an_artifact_cannot_answer_is_refused_before_it_loads(compiled: Path, flags: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=flags[0].partition("=")[0]) as e:
        launch(compiled, *flags)
    assert e.value.exit_code == 2


def test_metrics_without_their_package_are_refused_in_one_line(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str | None:
        return None if name == "prometheus_client" else installed(name)

    monkeypatch.setattr(preflight, "Machine", partial(Machine, version=version))
    launch(compiled)
    with pytest.raises(EnvironmentProblem) as e:
        launch(compiled, "--enable-metrics")
    (line,) = e.value.message.splitlines()[1:]
    assert "prometheus_client: not installed; needed: for --enable-metrics" in line
    assert "`pip install prometheus_client`" in line


def test_an_override_is_told_with_both_values(compiled: Path) -> None:
    eps = json.loads((compiled / "config.json").read_text())["rms_norm_eps"]
    with pytest.raises(UsageError) as e:
        launch(compiled, "--json-model-override-args", '{"rms_norm_eps": 0.25, "rope_scaling": {"factor": 4.0}}')
    for words in (
        f"rms_norm_eps is {eps} in the artifact, not 0.25",
        "rope_scaling.factor is absent",
        "not 4.0",
    ):
        assert words in e.value.message


@pytest.mark.parametrize(
    "flags",
    [
        ("--pp-size", "1"),
        ("--load-format", "auto"),
        ("--kv-cache-dtype", "auto"),
        ("--json-model-override-args", '{"eos_token_id": 5}'),
        ("--model-impl", "mindspore"),
    ],
    ids=" ".join,
)
def test_what_asks_for_nothing_is_passed_on(compiled: Path, flags: tuple[str, ...]) -> None:
    assert launch(compiled, *flags).argv[-len(flags) :] == list(flags)


def test_a_flag_that_nobody_tried_is_passed_on_with_a_word(compiled: Path) -> None:
    assert untried({"--schedule-policy": "fcfs", "--log-level": "x", "--quantization": "y"}) == [
        "--schedule-policy"
    ]
    done = run_msconv("serve", compiled, "--print-command", "--", "--schedule-policy", "fcfs")
    assert done.code == 0
    assert "--schedule-policy fcfs" in done.stdout
    assert "--schedule-policy: nobody has tried" in done.stderr


def config(root: Path, **other: Any) -> SimpleNamespace:
    raw = json.loads((root / "config.json").read_text())
    rope = raw.get("rope_parameters") or {"rope_type": "default"}
    return SimpleNamespace(**{**raw, "rope_parameters": rope, **other})


@pytest.mark.parametrize("key", [k for k in COMPUTED if k in ("hidden_size", "vocab_size", "rms_norm_eps")])
def test_another_configuration_is_refused_wherever_it_comes_from(compiled: Path, key: str) -> None:
    refuse_other(Artifact(compiled), config(compiled), {})
    with pytest.raises(ArtifactError, match=rf"{key} is .* in the artifact, not 77"):
        refuse_other(Artifact(compiled), config(compiled, **{key: 77}), None)
    with pytest.raises(ArtifactError, match=r"rope.*yarn"):
        scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
        refuse_other(Artifact(compiled), config(compiled, rope_parameters=scaled), None)


def test_an_edited_config_is_refused(own_artifact: Path) -> None:
    path = own_artifact / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(ArtifactError, match=r"config\.json"):
        launch(own_artifact)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        refuse_other(Artifact(own_artifact), config(own_artifact), None)


def test_a_server_needs_a_tokenizer_unless_it_takes_ids(own_artifact: Path) -> None:
    (own_artifact / "tokenizer.json").rename(own_artifact / "tiktoken.model")
    with pytest.raises(
        (EnvironmentProblem, ArtifactError), match=r"tokenizer[\s\S]*tiktoken\.model[\s\S]*--skip-tokenizer-init"
    ):
        launch(own_artifact)
    done = run_msconv("doctor", own_artifact)
    assert done.code == 4
    assert "tiktoken.model" in done.stdout


def test_keys_are_not_shown(compiled: Path) -> None:
    argv = ["--api-key", "s1", "--admin-api-key=s2", "--ssl-keyfile-password", "s3", "--api", "s4", "--port", "1"]
    shown = hide_words(argv)
    assert not [word for word in shown if "s1" in word or "s2" in word or "s3" in word or "s4" in word]
    assert shown[-2:] == ["--port", "1"]
    assert hide_fields({"api_key": "s1", "admin_api_key": None, "port": 1}) == {
        "api_key": HIDDEN,
        "admin_api_key": None,
        "port": 1,
    }
    found = launch(compiled, "--api-key", "s1")
    assert "s1" in found.shell()
    assert "s1" not in found.shell(hide_keys=True)
