"""A newcomer at the keyboard: what is typed as other tools have it, and what is answered."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from msconv.checkpoint.reach import unreachable
from msconv.cli import COMMANDS, cli, here
from msconv.cli.console import Volume, find_artifact, set_volume
from msconv.cli.phases import Phases
from msconv.cli.result import _explain
from msconv.families import configure
from msconv.published import published
from msconv.recipes import all_recipes, read_recipe
from msconv.steps import estimate
from msconv_runtime.artifact import Artifact
from msconv_runtime.errors import ArtifactError, MsconvError, UsageError
from msconv_runtime.targets import TARGETS, meant_target
from tests.commands import run_msconv
from tests.conftest import Checkpoints

READY = Path(__file__).parents[1] / "format1"  # artifacts with graphs


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with artifacts/tiny-tp1 (for the CPU) and artifacts/tiny-tp2 (and for Ascend)."""
    for name in ("tiny-tp1", "tiny-tp2", "lone-tp2"):
        shutil.copytree(READY / f"qwen3-tp{name[-1]}", tmp_path / "artifacts" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def normal_volume() -> Iterator[None]:
    set_volume(Volume.NORMAL)
    yield
    set_volume(Volume.NORMAL)


def refused(line: str) -> tuple[str, str]:
    """Message and hint of the error that `msconv LINE` ends with."""
    with pytest.raises((MsconvError, click.ClickException)) as caught:
        cli.main(shlex.split(line), prog_name="msconv", standalone_mode=False)
    _, message, hint, code = _explain(caught.value)
    assert code != 0
    return message, hint


# Help


@pytest.mark.parametrize("line", ["", "help", "-h", "--help"])
def test_help_is_what_one_gets_who_does_not_know_what_to_ask(line: str) -> None:
    done = run_msconv(*line.split())
    assert done.code == 0
    assert "Usage: msconv" in done.stdout
    assert all(name in done.stdout for name in COMMANDS)


def test_help_and_version_are_words_too() -> None:
    assert "Usage: msconv convert" in run_msconv("help", "convert").stdout
    assert run_msconv("version").stdout == run_msconv("--version").stdout
    assert refused("help frobnicate")[0] == "No such command: frobnicate."


# Near words


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("conver Qwen3-8B", "Did you mean `msconv convert`?"),
        ("run artifacts/x", "Did you mean `msconv serve`?"),
        ("download me/x", "Did you mean `msconv pull`?"),
        ("hlep", "Did you mean `msconv help`?"),
        ("frobnicate", "`msconv help` lists the commands."),
        ("convert Qwen3-8B --tp-size 4", "Did you mean --tp?"),
        ("convert Qwen3-8B --tensor-parallel-size 4", "Did you mean --tp?"),
        ("convert Qwen3-8B --tensor_parallel_size=4", "Did you mean --tp?"),
        ("convert Qwen3-8B -tp 4", "Did you mean --tp?"),
        ("convert Qwen3-8B -o out", "Did you mean --output?"),
        ("convert Qwen3-8B --ouput out", "Did you mean --output?"),
        ("convert --model-path Qwen3-8B", "Did you mean --model?"),
        ("plan Qwen3-8B --max-model-len 8192", "Did you mean --context?"),
        ("convert Qwen3-8B --dtype bf16", "Did you mean --dtype bfloat16?"),
        ("convert Qwen3-8B --dtype fp16", "Did you mean --dtype float16?"),
        ("convert Qwen3-8B --dtype torch.bfloat16", "Did you mean --dtype bfloat16?"),
        ("compile artifacts/tiny-tp2 --target 910b", "Did you mean ascend910b?"),
        ("compile artifacts/tiny-tp2 --target Ascend910B", "Did you mean ascend910b?"),
        ("verify artifacts/tiny-tp2 --target ascend-910b", "Did you mean ascend910b?"),
        ("verify artifacts/tiny-tp2 --target npu", "Say which NPU, as `npu-smi info` names it.  Targets"),
        ("serve tiny-tp1 --device ascend", "Did you mean --device npu?"),
        ("serve tiny-tp1 --device gpu", "`msconv serve --help` shows how."),
        ("serve --model-path tiny-tp1", "`msconv serve ARTIFACT`"),
        ("verify --artifact tiny-tp1", "`msconv verify ARTIFACT`"),
        ("serve tiny-tp1 --prot 4000", "Did you mean --port?"),
        ("convert", "Which model?"),
        ("convert --model nowhere", "`msconv recipes` lists recipes"),
        ("convert artifacts", "How many ranks?"),
    ],
)
def test_what_other_tools_call_it_is_answered_with_what_it_is_called_here(
    shelf: Path, line: str, hint: str
) -> None:
    assert hint in refused(line)[1]


def test_flags_of_sglang_are_put_where_they_belong(shelf: Path) -> None:
    line = "serve tiny-tp1 --mem-fraction-static 0.5 --port 4000 --disable-radix-cache"
    message, hint = refused(line)
    assert message == "No such option: --mem-fraction-static."
    right = "msconv serve tiny-tp1 --port 4000 -- --mem-fraction-static 0.5 --disable-radix-cache"
    assert hint == f"SGLang's flags come after --: `{right}`."
    done = run_msconv(*shlex.split(right.replace(" -- ", " --print-command -- "))[1:])
    assert done.code == 0, done.stderr
    assert "--mem-fraction-static 0.5" in done.stdout


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("910b", "ascend910b"),
        ("Ascend910B3", "ascend910b"),
        ("Atlas A3", "ascend910c"),
        ("Ascend910_9391", "ascend910c"),
        ("310P3", "ascend310p"),
        ("asend910b", "ascend910b"),
        ("CPU", "cpu"),
        ("H100", ""),
    ],
)
def test_names_of_chips_are_known(name: str, target: str) -> None:
    assert meant_target(name) == target


def test_experts_that_do_not_divide_are_told_what_works() -> None:
    message, hint = refused(f"plan {READY / 'deepseek_v3'} --tp 4 --ep 3")
    assert "--tp 4 --ep 3" in message
    assert hint == "With --tp 4 give --ep 1, 2 or 4."


# Models and artifacts without flags and directories


def test_a_model_needs_no_flag(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("untied")
    plain = run_msconv("plan", model, "--tp", 2, "--json")
    assert plain.code == 0, plain.stderr
    assert plain.json["ranks"] == run_msconv("plan", "--model", model, "--tp", 2, "--json").json["ranks"]
    assert f"Next: msconv convert --model {model} --tp 2" in plain.stderr
    made = run_msconv("convert", model, "--tp", 1, "--output", tmp_path / "out")
    assert made.code == 0, made.stderr
    message, hint = refused(f"plan {model} --model {tmp_path} --tp 1")
    assert "two models" in message
    assert hint == "Give one of them."


def test_a_word_comes_before_the_environment(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSCONV_PLAN_MODEL", "nowhere")
    assert run_msconv("plan", checkpoint("untied"), "--tp", 1).code == 0


def test_home_is_found_where_no_shell_has_seen_it(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(checkpoint("untied"))
    done = run_msconv("convert", "--model=~/model", "--tp", 1, "--output=~/out", "--json")
    assert done.code == 0, done.stderr
    assert done.json["artifact"] == str(tmp_path / "out")
    assert run_msconv("inspect", "~/out").code == 0


def test_a_name_is_looked_for_among_the_artifacts(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_artifact(Path("tiny-tp1")) == Path("artifacts/tiny-tp1")
    assert find_artifact(Path("lone")) == Path("artifacts/lone-tp2")
    assert "Artifact: artifacts/lone-tp2" in capsys.readouterr().err
    with pytest.raises(UsageError, match="2 artifacts") as several:
        find_artifact(Path("tiny"))
    assert several.value.hint == "Name one: tiny-tp1, tiny-tp2."
    with pytest.raises(ArtifactError, match="no such directory") as near:
        find_artifact(Path("tiny-tp3"))
    assert "tiny-tp2" in near.value.hint
    (shelf / "lone").mkdir()
    assert find_artifact(Path("lone")) == Path("lone")


# Targets


def test_without_a_target_all_mean_the_same_and_say_it(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = Artifact(shelf / "artifacts/tiny-tp1"), Artifact(shelf / "artifacts/tiny-tp2")
    assert (one.targets, two.targets) == (["cpu"], ["ascend910b", "cpu"])
    assert (here.usual_target(one), here.usual_target(two)) == ("cpu", "cpu")
    assert here.usual_device(two, None, False) == "cpu"
    assert capsys.readouterr().err.count("Target: cpu (") == 2
    monkeypatch.setattr(here, "machine_kind", lambda: "npu")
    assert (here.usual_target(one), here.usual_target(two)) == ("cpu", "ascend910b")
    assert here.usual_device(two, None, False) == "npu"
    assert here.usual_device(one, None, False) == "cpu"


@pytest.mark.parametrize(("chip", "target"), [("910B3", "ascend910b"), ("310P3", "ascend310p"), ("910X", "")])
def test_an_npu_is_compiled_for_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chip: str, target: str
) -> None:
    program = tmp_path / "npu-smi"
    program.write_text(f"#!/bin/sh\necho '| 0     {chip}               | OK            | 100 |'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(here, "machine_kind", lambda: "npu")
    if target:
        assert here.machine_target() is TARGETS[target]
    else:
        with pytest.raises(UsageError, match="does not say of which kind"):
            here.machine_target()


# Recipes of several machines


def test_every_machine_has_a_line_that_can_be_pasted() -> None:
    shown = run_msconv("recipes", "DeepSeek-R1")
    lines = [line.strip() for line in shown.stdout.splitlines() if line.startswith("  ")]
    (first,) = [line for line in lines if line.startswith("FIRST=")]
    serve = [line for line in lines if line.startswith("msconv serve")]
    assert len(serve) == 4
    script = "\n".join([first, *(f'set -- {line.removeprefix("msconv ")}; echo "$@"' for line in serve)])
    pasted = subprocess.run(["sh", "-eu", "-c", script], capture_output=True, text=True, check=True)
    for rank, line in enumerate(pasted.stdout.splitlines()):
        words = line.split()
        command = cli.get_command(click.Context(cli), words[0])
        assert command
        nodes = command.make_context(words[0], words[1:]).params
        assert (nodes["nnodes"], nodes["node_rank"], nodes["dist_init_addr"]) == (4, rank, "10.0.0.1:5000")


# Next


def test_what_follows_a_result_can_be_pasted(shelf: Path, checkpoint: Checkpoints) -> None:
    model, out = checkpoint("untied"), shelf / "a directory"
    shutil.rmtree(shelf / "artifacts")
    typed: list[tuple[object, ...]] = [
        ("recipes",),
        ("doctor",),
        ("plan", model, "--tp", 2),
        ("convert", model, "--tp", 2, "--output", out),
        ("inspect", out),
        ("report", out),
        ("serve", READY / "qwen3-tp1", "--print-command"),
        ("inspect", READY / "qwen3-tp2"),
    ]
    for args in typed:
        done = run_msconv(*args)
        assert done.code == 0, done.stderr
        last = done.stderr.splitlines()[-1]
        words = shlex.split(last.removeprefix("Next: "), comments=True)
        assert words[0] in ("msconv", "xdg-open")
        if words[0] == "msconv":
            command = cli.get_command(click.Context(cli), words[1])
            assert command
            command.make_context(words[1], words[2:])


def test_what_serves_an_artifact_says_that_it_has_no_tokenizer(tmp_path: Path) -> None:
    assert here.serve_command(tmp_path, "--device", "cpu") == (
        f"msconv serve {tmp_path} --device cpu -- --skip-tokenizer-init"
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    assert here.serve_command(tmp_path) == f"msconv serve {tmp_path}"


# Interruptions


@pytest.mark.slow
@pytest.mark.parametrize(("command", "hint"), [("compile", "The artifact is whole"), ("verify", "as it was")])
def test_an_interruption_is_answered_at_once_and_leaves_nothing(
    own_artifact: Path, tmp_path: Path, command: str, hint: str
) -> None:
    stand = tmp_path / "here"
    stand.mkdir()
    before = {p: p.read_bytes() for p in own_artifact.rglob("*") if p.is_file() and ".msconv" not in p.parts}
    for delay in (1.0, 3.5):
        process = subprocess.Popen(
            [sys.executable, "-m", "msconv", command, str(own_artifact)],
            cwd=stand,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stderr
        while "..." not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        sent = time.monotonic()
        out, said = process.communicate(timeout=30)
        assert time.monotonic() - sent < 3
        assert (process.returncode, out) == (130, "")
        assert "Traceback" not in said
        error, following = said.splitlines()[-2:]
        assert error == "Error: Interrupted."
        assert hint in following
        assert list(stand.iterdir()) == []
    after = {p: p.read_bytes() for p in own_artifact.rglob("*") if p.is_file() and ".msconv" not in p.parts}
    assert after == before


# Long work


def test_a_phase_says_how_long_it_will_take() -> None:
    now = [0.0]
    work = Phases("comparing", lambda: now[0])
    assert work.line() == "comparing, 0:00 so far"
    work.tell("transformers", 0, 60)
    now[0] = 90
    work.tell("transformers", 20, 60)
    assert work.line() == "comparing: transformers, 20 of 60, 1:30 so far, about 3:00 left"
    work.tell("graphs", 0, 4)
    now[0] = 3700
    assert work.line() == "comparing: graphs, 0 of 4, 1:01:40 so far"


# Without a network


@pytest.mark.parametrize("line", ["convert --model Qwen3-8B --tp 4", "compile --model Qwen3-8B --tp 4 --output x"])
def test_without_a_network_that_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    begun = time.monotonic()
    done = run_msconv(*line.split(), cwd=tmp_path)
    assert time.monotonic() - begun < 10  # 2 s on a machine that does nothing else; a client's retries take 16
    assert done.code == 1
    assert "Qwen/Qwen3-8B: no such directory here, and http://127.0.0.1:9 cannot be reached" in done.stderr
    assert "give the directory of a checkpoint that is here" in done.stderr.splitlines()[-1]


def test_a_hub_that_says_nothing_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert unreachable(f"http://{address}") == ""
    assert "refused" in unreachable(f"http://{address}")
    begun = time.monotonic()
    assert unreachable("http://no-such-host.invalid")
    assert time.monotonic() - begun < 3


def test_a_proxy_is_asked_in_the_hubs_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert "127.0.0.1 port 9" in unreachable("https://no-such-host.invalid")


def test_recipes_are_planned_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = run_msconv("plan", "Qwen3-0.6B", "--json")
    assert done.code == 0, done.stderr
    assert done.json["parameters"] == 596_049_920  # the head is the embedding
    assert done.json["free_bytes"] > 0
    assert "Planned from the configuration that came with msconv." in done.stderr


def test_every_recipe_has_its_models_configuration() -> None:
    data = Path(__file__).parents[1] / "data" / "configs"
    models = {read_recipe(path).model for path in all_recipes().values()}
    assert len(models) > 15
    for model in models:
        directory = published(model)
        assert directory, model
        shipped = json.loads((directory / "config.json").read_text())
        whole = json.loads((data / f"{model.partition('/')[2]}.json").read_text())
        assert configure(shipped, "shipped") == configure(whole, "whole")
    assert published("Qwen/Qwen3-8B@v1") == published("Qwen/Qwen3-8B")
    assert published("Qwen/..") is None
    assert published("else/Qwen3-8B") is None


def test_a_plan_ends_with_the_conversion_that_fits(
    tmp_path: Path, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = checkpoint("untied"), tmp_path / "out"
    line = ("plan", str(model), "--tp", "1", "--output", str(out), "--device-memory")
    whole = run_msconv(*line, "1G", "--json")
    assert whole.json["fits"] is True
    assert whole.stderr.splitlines()[-1] == f"Next: msconv convert --model {model} --tp 1 --output {out}"
    less = run_msconv(*line, str(whole.json["ranks"][0]["device_bytes"]), "--json")
    assert less.json["fits"] is False
    tp = less.json["smallest_tp"]
    assert tp > 1
    assert f"--tp {tp} --output {out}  # the smallest tp that fits in" in less.stderr.splitlines()[-1]


def test_a_plan_knows_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert estimate._lacking(tmp_path / "x" / "y", 900, 0) == 0
    assert estimate._lacking(tmp_path / "x" / "y", 900, 200) == 100
    assert estimate._lacking(tmp_path / "x" / "y", 1500, 0) == 500
