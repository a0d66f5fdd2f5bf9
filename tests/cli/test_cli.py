"""The command line: what it loads, what it prints where, and how it says no."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import edit_json
from tests.commands import Result, run_msconv
from tests.conftest import Checkpoints

HEAVY = {"torch", "mindspore", "transformers", "sglang"}
COMMANDS = ("convert", "compile", "verify", "serve", "inspect")
CONVERTED = {"artifact", "bytes_read", "bytes_written", "seconds", "peak_rss_bytes", "resumed"}
COMPILED = {"target", "phase", "role", "variant", "path", "nodes", "fused", "seconds", "taken", "peak_rss_bytes"}


def imported(stderr: str) -> set[str]:
    """Top-level packages that `-X importtime` saw."""
    return {m.split(".")[0] for m in re.findall(r"^import time:.*\| +(\S+)$", stderr, re.M)}


def check_error(done: Result, exit_code: int, code: str | None = None) -> dict[str, str]:
    """A failed `--json` command: one object on stdout, words on stderr, no traceback anywhere."""
    assert "Traceback" not in done.stdout + done.stderr
    assert done.code == exit_code, done.stderr
    assert set(done.json) == {"error"}
    error: dict[str, str] = done.json["error"]
    assert set(error) == {"code", "message", "hint"}
    assert error["code"] != "internal", error
    assert error["message"]
    assert code in (None, error["code"])
    assert "Error: " in done.stderr
    return error


# What is loaded


def test_help_loads_nothing_heavy() -> None:
    done = run_msconv("--help", python=("-X", "importtime"))
    assert done.code == 0
    seen = imported(done.stderr)
    assert "click" in seen
    assert not seen & {*HEAVY, "numpy", "rich"}
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_nothing_heavy(command: str) -> None:
    done = run_msconv(command, "--help", python=("-X", "importtime"))
    assert done.code == 0
    assert not imported(done.stderr) & HEAVY
    assert "Usage: " in done.stdout
    assert "--json" in done.stdout


def test_converting_loads_neither_torch_nor_mindspore(checkpoint: Checkpoints, tmp_path: Path) -> None:
    options = ("--model", checkpoint("bfloat16_shards"), "--tp", 2, "--dtype", "float16")
    done = run_msconv("convert", *options, "--output", tmp_path / "out", python=("-X", "importtime"))
    assert done.code == 0
    seen = imported(done.stderr)
    assert "numpy" in seen
    assert not seen & HEAVY


def test_inspecting_loads_neither_torch_nor_mindspore(compiled: Path) -> None:
    done = run_msconv("inspect", compiled, "--check", python=("-X", "importtime"))
    assert done.code == 0
    assert not imported(done.stderr) & HEAVY


def test_version_is_said_in_a_line() -> None:
    done = run_msconv("--version")
    assert done.code == 0
    assert re.fullmatch(r"msconv, version \d+\.\d+\.\d+\n", done.stdout)


# What is printed


def test_convert_answers_with_exactly_the_promised_fields(checkpoint: Checkpoints, tmp_path: Path) -> None:
    options = ("convert", "--model", checkpoint("untied"), "--tp", 2, "--output", tmp_path / "out", "--json")
    done = run_msconv(*options)
    assert done.code == 0
    assert set(done.json) == CONVERTED
    assert done.json["artifact"] == str(tmp_path / "out")
    assert done.json["resumed"] is False
    files = list((tmp_path / "out" / "weights").iterdir())
    assert done.json["bytes_written"] == sum(p.stat().st_size for p in files)
    source = (checkpoint("untied") / "model.safetensors").stat().st_size
    assert 0.99 * source < done.json["bytes_read"] <= source
    assert 0 < done.json["seconds"] < 60
    assert 10 << 20 < done.json["peak_rss_bytes"] < 500 << 20
    again = run_msconv(*options).json
    assert set(again) == CONVERTED
    assert (again["bytes_read"], again["bytes_written"]) == (0, 0)


@pytest.mark.slow
def test_compile_answers_with_exactly_the_promised_fields(own_artifact: Path) -> None:
    done = run_msconv("compile", own_artifact, "--target", "cpu", "--json")
    assert done.code == 0
    assert set(done.json) == {"artifact", "graphs"}
    assert done.json["artifact"] == str(own_artifact)
    phases = ["prefill", "decode", "decode_all", "native", "native_all"]
    assert [(g["target"], g["phase"]) for g in done.json["graphs"]] == [("cpu", p) for p in phases]
    for graph in done.json["graphs"]:
        assert set(graph) == COMPILED
        assert Path(graph["path"]).is_file()
        assert graph["nodes"] > 10
        assert graph["seconds"] > 0
        assert graph["peak_rss_bytes"] > 10 << 20


@pytest.mark.slow
def test_verify_answers_with_the_promised_fields(own_artifact: Path) -> None:
    done = run_msconv("verify", own_artifact, "--json")
    assert done.code == 0
    answer = done.json
    assert set(answer) >= {"ok", "target", "ranks", "max_abs_logit_error", "argmax_agreement", "coverage"}
    assert answer["coverage"] == {"missing": [], "unused": []}
    assert (answer["ok"], answer["target"], answer["ranks"]) == (True, "cpu", 1)
    assert 0 < answer["max_abs_logit_error"] < 1e-4
    assert answer["argmax_agreement"] == 1.0


@pytest.mark.slow
def test_a_refused_verification_answers_with_one_object(own_artifact: Path, checkpoint: Checkpoints) -> None:
    done = run_msconv("verify", own_artifact, "--reference", checkpoint("other_seed"), "--json")
    assert done.code == 3
    assert done.json["ok"] is False


def test_words_go_to_stderr_and_name_the_next_command(checkpoint: Checkpoints, tmp_path: Path) -> None:
    done = run_msconv("convert", "--model", checkpoint("untied"), "--tp", 2, "--output", tmp_path / "out")
    assert done.code == 0
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Next: msconv compile ")
    assert "\x1b" not in done.stderr


def test_the_default_output_is_named_after_model_and_ranks(checkpoint: Checkpoints, tmp_path: Path) -> None:
    done = run_msconv("convert", "--model", checkpoint("untied"), "--tp", 2, "--json", cwd=tmp_path)
    assert done.json["artifact"] == "artifacts/untied-tp2"
    assert (tmp_path / "artifacts" / "untied-tp2" / "READY").is_file()
    newest = run_msconv("inspect", "--json", cwd=tmp_path)
    assert newest.json["artifact"] == "artifacts/untied-tp2"
    assert "artifacts/untied-tp2" in newest.stderr


def test_inspect_shows_coverage_and_checks_every_byte(own_artifact: Path) -> None:
    shown = run_msconv("inspect", own_artifact, "--check", "--json").json
    assert shown["check"] == {"ok": True, "damage": []}
    assert shown["proven"] == {"cpu": None}
    kept = {k["name"]: k["count"] for k in shown["coverage"]["kept"]}
    assert kept["model.layers.{0..3}.self_attn.qkv_proj.weight"] == 4
    text = run_msconv("inspect", own_artifact).stdout
    assert "UNPROVEN" in text
    path = own_artifact / "weights/model-rank-0-part-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = run_msconv("inspect", own_artifact, "--check", "--json")
    assert done.code == 1
    assert done.json["check"]["ok"] is False
    (damage,) = done.json["check"]["damage"]
    assert damage["tensor"] == "lm_head.weight"
    assert "lm_head.weight" in run_msconv("inspect", own_artifact, "--check").stderr


# How it says no


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["--frobnicate"],
        ["convert"],
        ["convert", "--tp", "2"],
        ["convert", "--model", "M"],
        ["convert", "--model", "M", "--tp", "0"],
        ["convert", "--model", "M", "--tp", "-2"],
        ["convert", "--model", "M", "--tp", "two"],
        ["convert", "--model", "M", "--tp", "99999999999999999999"],
        ["convert", "--model", "M", "--tp", "4", "--ep", "3"],
        ["convert", "--model", "M", "--tp", "2", "--dtype", "int8"],
        ["convert", "--model", "M", "--tp", "2", "--jobs", "0"],
        ["convert", "--model", "M", "--tp", "2", "--max-memory", "lots"],
        ["convert", "--model", "M", "--tp", "2", "--max-memory", "-5M"],
        ["convert", "--model", "M", "--tp", "2", "--max-memory", "nan"],
        ["convert", "--model", "M", "--tp", "2", "--max-memory", "1e999"],
        ["convert", "--model", "M", "--tp", "2", "--frobnicate"],
        ["convert", "--model", "M", "--tp", "2", "extra"],
        ["convert", "--model", "nowhere", "--tp", "2"],
        ["convert", "--model", "", "--tp", "2"],
        ["convert", "--model", "x" * 300 + "/y", "--tp", "2"],
        ["convert", "--model", "\udcff", "--tp", "2"],
        ["convert", "--model", "/dev/null", "--tp", "2"],
        ["convert", "--model", "/proc/self/mem", "--tp", "2"],
        ["convert", "--model", "empty", "--tp", "2"],
        ["inspect"],
        ["verify"],
        ["compile"],
    ],
    ids=lambda a: " ".join(a)[:60].encode("ascii", "replace").decode(),
)
def test_wrong_use_exits_2_and_says_what_is_wrong(
    checkpoint: Checkpoints, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = [str(checkpoint("untied")) if a == "M" else a for a in arguments]
    check_error(run_msconv(*arguments, "--json", cwd=tmp_path), 2, "usage")


@pytest.mark.parametrize("name", ["x" * 300, "\udcff", "a\nb", "loop"])
@pytest.mark.parametrize("command", ["inspect", "compile", "verify"])
def test_an_artifact_that_cannot_be_is_refused(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    check_error(run_msconv(command, name, "--json", cwd=tmp_path), 1, "artifact")


@pytest.mark.parametrize("output", ["x" * 300, "loop", "\udcff/x" * 2000])
def test_an_output_that_cannot_be_is_refused(checkpoint: Checkpoints, tmp_path: Path, output: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    options = ("--model", checkpoint("untied"), "--tp", 1, "--output", output, "--json")
    done = run_msconv("convert", *options, cwd=tmp_path)
    assert done.code in (2, 5)
    check_error(done, done.code)


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "--model", "{model}", "--tp", 1),
        ("compile", "--model", "{model}", "--tp", 1, "--target", "cpu"),
        ("reshard", "{artifact}", "--tp", 1),
        ("pull", "me/it"),
        ("report", "{artifact}"),
    ],
)
def test_an_empty_output_is_not_the_current_directory(
    checkpoint: Checkpoints, compiled: Path, tmp_path: Path, command: tuple[str | int, ...]
) -> None:
    places = {"model": checkpoint("untied"), "artifact": compiled}
    words = [word.format(**places) if isinstance(word, str) else word for word in command]
    error = check_error(run_msconv(*words, "--output", "", "--json", cwd=tmp_path), 2, "usage")
    assert "--output" in error["message"]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_no_artifact(checkpoint: Checkpoints) -> None:
    error = check_error(run_msconv("compile", checkpoint("untied"), "--json"), 1, "artifact")
    assert "not an artifact" in error["message"]
    assert "msconv convert" in error["hint"]


def test_an_artifact_is_no_checkpoint(compiled: Path) -> None:
    error = check_error(run_msconv("convert", "--model", compiled, "--tp", 1, "--json"), 2, "usage")
    assert "artifact" in error["message"]


def test_an_unknown_target_is_told_the_known_ones(compiled: Path) -> None:
    error = check_error(run_msconv("compile", compiled, "--target", "abacus", "--json"), 2, "usage")
    assert "cpu" in error["hint"]


def test_an_artifact_without_graphs_is_told_to_compile(checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_msconv("convert", "--model", checkpoint("untied"), "--tp", 1, "--output", out).code == 0
    error = check_error(run_msconv("verify", out, "--json"), 1, "artifact")
    assert "msconv compile" in error["hint"]


def test_ranks_that_do_not_divide_exit_1_with_those_that_do(checkpoint: Checkpoints, tmp_path: Path) -> None:
    options = ("--model", checkpoint("untied"), "--tp", 3, "--json")
    error = check_error(run_msconv("convert", *options, cwd=tmp_path), 1, "plan")
    assert "8 heads do not split over tp=3" in error["message"]
    assert error["hint"] == "Try --tp 1, 2, 4 or 8."
    assert not list(tmp_path.iterdir())


def test_too_little_memory_exits_5(checkpoint: Checkpoints, tmp_path: Path) -> None:
    options = ("--model", checkpoint("untied"), "--tp", 2, "--max-memory", "1M", "--json")
    error = check_error(run_msconv("convert", *options, cwd=tmp_path), 5, "resource")
    assert "--max-memory" in error["hint"]


def test_a_damaged_checkpoint_exits_1(own_checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = own_checkpoint("untied")
    os.truncate(model / "model.safetensors", 1000)
    options = ("--model", model, "--tp", 2, "--output", tmp_path / "out", "--json")
    error = check_error(run_msconv("convert", *options), 1, "checkpoint")
    assert "model.safetensors" in error["message"]
    assert not (tmp_path / "out").exists()


def test_an_unsupported_family_exits_2(own_checkpoint: Checkpoints) -> None:
    model = own_checkpoint("untied")
    edit_json(model / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    error = check_error(run_msconv("convert", "--model", model, "--tp", 2, "--json"), 2, "usage")
    assert "Qwen3ForCausalLM" in error["hint"]


def little_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads"])
def test_a_config_that_promises_billions_is_refused_at_once(own_checkpoint: Checkpoints, key: str) -> None:
    model = own_checkpoint("untied")
    edit_json(model / "config.json", **{key: 2**32})
    done = run_msconv("convert", "--model", model, "--tp", 2, "--json", before=little_memory)
    error = check_error(done, 1)
    assert error["code"] in ("checkpoint", "plan")


BAD_CONFIGS: dict[str, Any] = {
    "no numbers": {"hidden_size": "128"},
    "no heads": {"num_attention_heads": None},
    "zero heads": {"num_attention_heads": 0},
    "odd dimensions": {"head_dim": 31},
    "rope": {"rope_parameters": {"rope_type": "yarn", "factor": "four"}},
    "rope list": {"rope_parameters": ["yarn"]},
    "rope zero": {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
    "another width": {"hidden_size": 64},
    "another depth": {"num_hidden_layers": 5},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("changes", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_does_not_fit_exits_1(
    own_checkpoint: Checkpoints, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = own_checkpoint("untied")
    edit_json(model / "config.json", **changes)
    options = ("--model", model, "--tp", 1, "--output", tmp_path / "out", "--json")
    check_error(run_msconv("convert", *options), 1)


def test_an_odd_tensor_name_is_named_in_the_error(own_checkpoint: Checkpoints) -> None:
    model = own_checkpoint("untied")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data.replace(b'"model.norm.weight"', b'"model.{no}.weight"', 1))
    error = check_error(run_msconv("convert", "--model", model, "--tp", 1, "--json"), 1, "plan")
    assert "model.{no}.weight" in error["message"]
    assert "model.norm.weight" in error["message"]


def test_a_reader_that_went_away_is_no_fault(compiled: Path) -> None:
    command = [sys.executable, "-m", "msconv", "inspect", str(compiled), "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "fault in msconv" not in done.stderr
    assert done.returncode == 1


def test_an_answer_that_cannot_be_written_is_no_fault_of_ours(compiled: Path) -> None:
    command = [sys.executable, "-m", "msconv", "inspect", str(compiled), "--json"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr
    assert done.returncode in (1, 5)


def test_errors_are_coloured_on_terminals_only(tmp_path: Path) -> None:
    done = run_msconv("inspect", tmp_path)
    assert done.code == 1
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    assert json.dumps(done.stderr).count("Error: ") == 1
