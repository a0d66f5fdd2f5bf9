"""Recipes on the command line: what wins over what, what is said about it, and what stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from msconv.cli import cli
from tests.commands import run_msconv
from tests.conftest import Checkpoints

MINE = """
model: owner/untied
tp: 2
dtype: float16
targets: [cpu]
devices: {kind: cpu, count: 2, memory_gib: 1}
context: 64
requests: 2
serve: {chunked-prefill-size: 512, log-level: warning}
"""
CONFIGS = Path(__file__).parents[1] / "data" / "configs"


@pytest.fixture(autouse=True)
def own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MSCONV_RECIPES with `mine`; the current directory is empty."""
    directory = tmp_path / "recipes"
    directory.mkdir()
    (directory / "mine.yaml").write_text(MINE)
    monkeypatch.setenv("MSCONV_RECIPES", str(directory))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return directory


def values(name: str, *args: object) -> dict[str, Any]:
    """What a command would be called with."""
    command = cli.get_command(click.Context(cli), name)
    assert command
    return command.make_context(name, list(map(str, args)), parent=click.Context(cli)).params


# What wins


def test_a_recipe_gives_its_layout_and_what_to_pull() -> None:
    found = values("convert", "--model", "mine")
    assert (found["model"], found["tp"], found["ep"], found["dtype"]) == ("owner/untied", 2, 1, "float16")
    found = values("plan", "--model", "DeepSeek-R1-910c")
    assert (found["model"], found["tp"], found["ep"]) == ("deepseek-ai/DeepSeek-R1", 32, 32)
    assert (found["context"], found["batch"], found["device_memory"]) == (32768, 6, 64 << 30)


def test_flags_beat_the_environment_that_beats_a_recipe_that_beats_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert values("plan", "--model", "mine")["context"] == 64
    monkeypatch.setenv("MSCONV_PLAN_CONTEXT", "128")
    assert values("plan", "--model", "mine")["context"] == 128
    assert values("plan", "--model", "mine", "--context", 256)["context"] == 256
    monkeypatch.delenv("MSCONV_PLAN_CONTEXT")
    assert values("plan", "--model", "./untied", "--tp", 2)["context"] == 4096


def test_a_recipe_can_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSCONV_CONVERT_RECIPE", "mine")
    monkeypatch.setenv("MSCONV_CONVERT_MODEL", "./untied")
    found = values("convert")
    assert (found["model"], found["tp"]) == ("./untied", 2)


@pytest.mark.parametrize("turned", [False, True])
def test_compile_takes_a_layout_only_for_what_has_none(turned: bool) -> None:
    assert values("compile", "artifact", "--recipe", "mine")["tp"] is None
    assert values("compile", "artifact", "--recipe", "mine")["targets"] == ("cpu",)
    pairs = [("--model", "./untied"), ("--recipe", "Qwen3-30B-A3B")]
    found = values("compile", *(word for pair in (reversed(pairs) if turned else pairs) for word in pair))
    assert (found["model"], found["tp"], found["ep"], found["targets"]) == ("./untied", 4, 4, ("ascend910b",))
    found = values("compile", "artifact", "--recipe", "mine", "--target", "ascend310p")
    assert found["targets"] == ("ascend310p",)


def test_serve_takes_the_device_of_a_recipe() -> None:
    assert values("serve")["device"] is None
    assert values("serve", "--recipe", "Qwen3-8B")["device"] == "npu"
    assert values("serve", "--recipe", "Qwen3-8B", "--device", "cpu")["device"] == "cpu"


# What is said


def test_values_are_printed_with_where_they_came_from(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSCONV_CONVERT_DTYPE", "float32")
    done = run_msconv("convert", "--model", checkpoint("untied"), "--recipe", "mine", "--ep", 1, "--json")
    assert done.code == 0, done.stderr
    said = "Values: tp 2 (recipe mine), ep 1 (command line), dtype float32 (MSCONV_CONVERT_DTYPE)"
    assert said in done.stderr.splitlines()
    assert done.stderr.splitlines()[-1] == "Next: msconv compile artifacts/untied-tp2 --recipe mine"


def test_a_recipe_leaves_no_trace_in_what_is_written(checkpoint: Checkpoints, tmp_path: Path) -> None:
    def convert(*options: object) -> dict[str, bytes]:
        out = tmp_path / f"out-{len(options)}"
        assert run_msconv("convert", "--model", checkpoint("untied"), *options, "--output", out).code == 0
        hidden = {".msconv", "report.html"}
        files = (p for p in out.rglob("*") if p.is_file() and not hidden & {*p.relative_to(out).parts})
        return {str(p.relative_to(out)): p.read_bytes() for p in files}

    assert convert("--recipe", "mine") == convert("--tp", 2, "--dtype", "float16")


def test_plain_values_are_not_repeated(checkpoint: Checkpoints) -> None:
    done = run_msconv("convert", "--model", checkpoint("untied"), "--tp", 1, "--dry-run")
    assert "Values: " not in done.stderr


def test_a_directory_of_the_same_name_wins_and_that_is_said(checkpoint: Checkpoints) -> None:
    shutil.copytree(checkpoint("untied"), "mine")
    done = run_msconv("plan", "--model", "mine", "--tp", 1, "--json")
    assert done.code == 0, done.stderr
    assert (done.json["model"], done.json["context"]) == ("mine", 4096)
    assert "mine: the directory of this name is taken; --recipe mine adds the values" in done.stderr
    done = run_msconv("plan", "--model", "mine", "--recipe", "mine", "--json")
    assert (len(done.json["ranks"]), done.json["context"]) == (2, 64)
    assert done.stderr.splitlines()[-1] == "Next: msconv convert --model mine --tp 2 --recipe mine"


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-32B-310p", "DeepSeek-V3-910c"])
def test_plan_says_that_a_recipe_fits_its_devices(name: str) -> None:
    recipe = run_msconv("recipes", name, "--json").json
    model = recipe["model"].partition("/")[2]
    Path(model).mkdir()
    (Path(model) / "config.json").write_text((CONFIGS / f"{model}.json").read_text())
    options = ("plan", "--model", f"./{model}", "--recipe", name)
    done = run_msconv(*options, "--json")
    assert done.code == 0, done.stderr
    assert done.json["fits"] is True
    assert done.json["device_memory_bytes"] == recipe["devices"]["memory_gib"] << 30
    assert (done.json["context"], done.json["batch"]) == (recipe["context"], recipe["requests"])
    assert len(done.json["ranks"]) == recipe["tp"]
    if recipe["tp"] > 4:  # a large model takes seconds; what follows is the command's, whatever the recipe
        return
    assert f" fits in {recipe['devices']['memory_gib']}.00 GiB" in run_msconv(*options).stdout
    assert run_msconv(*options, "--batch", 100 * recipe["requests"], "--json").json["fits"] is False


def test_without_a_recipe_ranks_must_be_said() -> None:
    done = run_msconv("convert", "--model", "./untied")
    assert done.code == 2
    assert "Missing option '--tp'" in done.stderr
    assert "msconv recipes" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("option", ["--model", "--recipe"])
def test_an_unknown_name_is_answered_with_near_ones(option: str) -> None:
    model = ("--model", "./untied") if option == "--recipe" else ()
    done = run_msconv("convert", *model, option, "qwen3-8b", "--json")
    assert done.code == 2
    assert "no recipe has this name" in done.json["error"]["message"]
    assert "Did you mean Qwen3-8B" in done.json["error"]["hint"]


def test_two_recipes_are_one_too_many() -> None:
    done = run_msconv("convert", "--recipe", "Qwen3-8B-310p", "--model", "Qwen3-8B", "--json")
    assert done.code == 2
    assert "two recipes" in done.json["error"]["message"]


def test_a_wrong_recipe_is_named_with_the_place(own_recipes: Path) -> None:
    (own_recipes / "mine.yaml").write_text(MINE.replace("tp: 2", "tp: two"))
    for command in (("convert", "--model", "mine"), ("recipes",), ("recipes", "mine")):
        done = run_msconv(*command, "--json")
        assert done.code == 2
        assert done.json["error"]["code"] == "recipe"
        assert done.json["error"]["message"] == f"{own_recipes / 'mine.yaml'}: tp: expected int, got str."


# The list


def test_recipes_are_listed_and_one_is_shown_with_its_commands(own_recipes: Path) -> None:
    listed = run_msconv("recipes")
    assert listed.code == 0
    head, *rows = listed.stdout.splitlines()
    assert head.split()[:4] == ["RECIPE", "MODEL", "TP", "EP"]
    names = {r["name"] for r in run_msconv("recipes", "--json").json["recipes"]}
    assert [row.split()[0] for row in rows] == [r["name"] for r in run_msconv("recipes", "--json").json["recipes"]]
    assert {"mine", "Qwen3-8B", "DeepSeek-R1"} <= names
    assert all(row.endswith("not run yet") for row in rows)
    shown = run_msconv("recipes", "mine").stdout
    assert str(own_recipes / "mine.yaml") in shown
    for command in run_msconv("recipes", "mine", "--json").json["commands"]:
        assert f"  {command}" in shown.splitlines()


def test_the_commands_of_every_recipe_are_commands() -> None:
    for recipe in run_msconv("recipes", "--json").json["recipes"]:
        steps = [command.split() for command in recipe["commands"]]
        assert [words[1] for words in steps] == [
            "convert",
            "compile",
            *["verify"] * len(recipe["targets"]),
            *["serve"] * recipe["devices"]["nodes"],
        ]
        for words in steps:
            values(words[1], *words[2:])  # parses


def test_a_recipe_in_a_file_is_named_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a deployment.yaml"
    path.write_text(MINE)
    first = run_msconv("recipes", path, "--json").json["commands"][0]
    assert first == f"msconv convert --model '{path}'"
    assert json.dumps(values("convert", "--model", path)["tp"]) == "2"


# Serving


@pytest.mark.slow
def test_serve_flags_of_a_recipe_come_before_those_that_are_typed(compiled: Path) -> None:
    options = ("serve", compiled, "--recipe", "mine", "--print-command", "--json")
    done = run_msconv(*options, "--", "--log-level", "debug")
    assert done.code == 0, done.stderr
    argv = done.json["argv"]
    for flag, value in {
        "--context-length": "64",
        "--max-running-requests": "2",
        "--chunked-prefill-size": "512",
        "--log-level": "debug",
    }.items():
        assert argv.count(flag) == 1
        assert argv[argv.index(flag) + 1] == value
    assert "--chunked-prefill-size 512" in done.stderr
    assert "is sized for tp 2, ep 1; this artifact has tp 1, ep 1" in done.stderr


@pytest.mark.slow
def test_serve_flags_are_for_the_device_of_the_recipe(compiled: Path) -> None:
    options = ("serve", compiled, "--recipe", "Qwen3-0.6B", "--print-command")
    done = run_msconv(*options, "--device", "cpu", "--json")
    assert done.code == 0, done.stderr
    assert "--max-running-requests" not in done.json["argv"]
    assert "its serve flags are not used" in done.stderr
    bare = run_msconv("serve", compiled, "--print-command", "--json")
    assert bare.json["argv"] == done.json["argv"]


@pytest.mark.slow
def test_compile_makes_the_graphs_of_a_recipe(own_artifact: Path) -> None:
    done = run_msconv("compile", own_artifact, "--recipe", "mine", "--json")
    assert done.code == 0, done.stderr
    assert {g["target"] for g in done.json["graphs"]} == {"cpu"}
    assert "target cpu (recipe mine)" in done.stderr
