"""How every command behaves: quiet and verbose, colours, hints, completion in a shell."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_command, run_msconv, run_python
from tests.conftest import Checkpoints


def terminal(*args: object, **environment: str) -> str:
    """stderr and stdout of `msconv ARGS` on a terminal."""
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-m", "msconv", *map(str, args)]
    done = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**env, **environment})
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        said += piece
    os.close(ours)
    done.wait()
    return said.decode()


# Quiet and verbose


@pytest.mark.parametrize("before", [True, False])
def test_quiet_leaves_only_data(checkpoint: Checkpoints, before: bool) -> None:
    command = ("plan", "--model", checkpoint("untied"), "--tp", 2)
    done = run_msconv("-q", *command) if before else run_msconv(*command, "--quiet")
    assert (done.code, done.stderr) == (0, "")
    assert "2 ranks of" in done.stdout


def test_quiet_still_says_what_went_wrong(checkpoint: Checkpoints) -> None:
    done = run_msconv("-q", "plan", "--model", checkpoint("untied"), "--tp", 3)
    assert done.code == 1
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("Error: model.layers.")
    assert last == "Next: Try --tp 1, 2, 4 or 8."


def test_quiet_by_the_environment(monkeypatch: pytest.MonkeyPatch, compiled: Path) -> None:
    monkeypatch.setenv("MSCONV_QUIET", "1")
    assert run_msconv("inspect", compiled).stderr == ""


def test_verbose_adds_versions_times_and_every_value(checkpoint: Checkpoints) -> None:
    done = run_msconv("plan", "--model", checkpoint("untied"), "--tp", 2, "-v")
    assert done.code == 0
    first, second, *_, last = done.stderr.splitlines()
    assert first.startswith("msconv 0.")
    assert "numpy 1.26" in first
    assert second.startswith("Values: tp 2 (command line), ep 1 (default), ")
    assert "context 4096 (default)" in second
    assert last.startswith("plan: ")
    assert last.endswith(" s")


@pytest.mark.parametrize("args", [("-q", "doctor", "-v"), ("doctor", "-q", "-v"), ("-qv", "doctor")])
def test_quiet_and_verbose_exclude_each_other(args: tuple[str, ...]) -> None:
    done = run_msconv(*args)
    assert done.code == 2
    assert "one or the other" in done.stderr


# Colours


def test_colours_are_for_a_terminal_that_did_not_ask_for_none() -> None:
    wrong = ("inspect", "nowhere")
    assert "\x1b[31m" in terminal(*wrong)
    assert "\x1b" not in terminal(*wrong, NO_COLOR="1")
    assert "\x1b[32m" in terminal("doctor")
    assert "\x1b" not in terminal("doctor", NO_COLOR="1")
    command = [sys.executable, "-m", "msconv", "doctor"]
    piped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "\x1b" not in piped.stdout + piped.stderr


# Hints


def test_a_success_ends_with_what_to_do_next(checkpoint: Checkpoints, tmp_path: Path) -> None:
    out, model = tmp_path / "out", checkpoint("untied")
    options = ("--model", model, "--tp", 2, "--output", out)
    for args, following in [
        (("plan", *options), f"msconv convert --model {model} --tp 2"),
        (("plan", *options, "--json"), f"msconv convert --model {model} --tp 2"),
        (("convert", *options, "--dry-run", "--dtype", "float16"), f"--model {model} --tp 2 --dtype float16"),
        (("convert", *options), f"msconv compile {out}"),
        (("inspect", out), f"msconv compile {out}"),
        (("inspect", out, "--json"), f"msconv compile {out}"),
        (("reshard", out, "--tp", 1, "--output", tmp_path / "one"), f"msconv compile {tmp_path / 'one'}"),
        (("doctor",), "msconv recipes"),
        (("recipes",), "msconv recipes Qwen3-8B"),
        (("recipes", "Qwen3-8B"), "msconv plan --model Qwen3-8B"),
        (("completion", "bash"), "msconv completion bash >"),
    ]:
        done = run_msconv(*args)
        assert done.code == 0, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("Next: ")
        assert following in last


def test_inspect_names_what_an_artifact_lacks_most(compiled: Path) -> None:
    assert run_msconv("inspect", compiled).stderr.endswith(f"Next: msconv verify {compiled} --target cpu\n")


@pytest.mark.parametrize(
    "args",
    [
        ("frobnicate",),
        ("convert", "--model", "nowhere", "--tp", 1),
        ("convert", "--model", "/dev/null", "--tp", 1),
        ("plan", "--model", "models/none", "--tp", "x"),
        ("inspect", "nowhere"),
        ("verify", "nowhere"),
        ("serve", "nowhere"),
        ("compile", "nowhere", "--tp", 2),
        ("reshard", "nowhere", "--tp", 1),
        ("recipes", "nowhere"),
        ("completion", "tcsh"),
    ],
    ids=lambda a: " ".join(map(str, a)),
)
def test_an_error_ends_with_what_to_do_next(tmp_path: Path, args: tuple[object, ...]) -> None:
    done = run_msconv(*args, cwd=tmp_path)
    assert done.code in (1, 2)
    *_, error, following = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    assert error.startswith("Error: ")
    assert following.startswith("Next: ")
    assert len(following) > len("Next: ")


# Completion


def complete(*words: str, cwd: Path | None = None) -> set[str]:
    """What a shell would be offered for the last of `words`."""
    env = {"_MSCONV_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    command = ["env", *(f"{k}={v}" for k, v in env.items()), sys.executable, "-m", "msconv"]
    done = run_command(command, cwd, 60)
    assert done.code == 0, done.stderr
    return {line.removeprefix("plain,") for line in done.stdout.splitlines() if line.startswith("plain,")}


def test_commands_flags_and_values_are_completed() -> None:
    assert complete("msconv", "con") == {"convert"}
    assert complete("msconv", "convert", "--mo") == {"--model"}
    assert complete("msconv", "convert", "--dtype", "f") == {"float16", "float32"}
    assert complete("msconv", "compile", "--target", "ascend9") == {"ascend910b", "ascend910c"}


def test_names_of_recipes_are_completed_in_any_case() -> None:
    kinds = ("", "-310p", "-910b-32g", "-910c", "-w8a8", "-w8a8-910c")
    expected = {f"Qwen3-8B{kind}" for kind in kinds}
    assert complete("msconv", "convert", "--model", "qwen3-8") == expected
    assert complete("msconv", "serve", "--recipe", "qwen3-8") == expected
    assert complete("msconv", "recipes", "qwen3-8") == expected


def test_artifacts_are_completed(compiled: Path, tmp_path: Path) -> None:
    shutil.copytree(compiled, tmp_path / "artifacts" / "untied-tp1")
    (tmp_path / "artifacts" / "other").mkdir()
    for command in ("compile", "verify", "serve", "inspect", "doctor", "reshard"):
        assert complete("msconv", command, "art", cwd=tmp_path) == {"artifacts/untied-tp1"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for_each_shell(shell: str) -> None:
    done = run_msconv("completion", shell)
    assert done.code == 0
    assert f"_MSCONV_COMPLETE={shell}_complete" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)


# Installed


@pytest.mark.slow
def test_an_installed_wheel_brings_the_recipes(tmp_path: Path) -> None:
    project = Path(__file__).parents[2]
    for part in ("converter", "runtime", "recipes"):
        shutil.copytree(project / part, tmp_path / "source" / part, symlinks=True)
    for part in ("pyproject.toml", "README.md"):
        shutil.copy(project / part, tmp_path / "source" / part)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, tmp_path / "source"], check=True, capture_output=True)
    shutil.rmtree(tmp_path / "source")
    done = run_command(
        ["env", f"PYTHONPATH={site}", sys.executable, "-m", "msconv", "recipes", "Qwen3-8B", "--json"], None, 60
    )
    assert done.code == 0, done.stderr
    assert done.json["path"] == str(site / "msconv" / "recipe_files" / "Qwen3-8B.yaml")


# Packages


@pytest.mark.parametrize("command", ["verify", "rehearse"])
@pytest.mark.parametrize("package", ["torch", "transformers", "safetensors"])
def test_a_package_of_the_reference_that_is_missing_is_named(compiled: Path, package: str, command: str) -> None:
    code = (
        "import sys; sys.modules[sys.argv[1]] = None; sys.argv = ['msconv', *sys.argv[2:]]\n"
        "from msconv.cli import main\nmain()"
    )
    done = run_python(code, package, command, compiled)
    assert done.code == 4
    assert f"{package} cannot be imported" in done.stderr
    assert done.stderr.splitlines()[-1] == 'Next: Install them: pip install "msconv[verify]".'


# Values of options


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_bound_that_is_no_number_is_refused_at_once(compiled: Path, value: str) -> None:
    done = run_msconv("verify", compiled, "--max-kl", value)
    assert done.code == 2
    assert "--max-kl" in done.stderr


@pytest.mark.parametrize("name", ["a/b..c", "a/b.git", "a--b/c"])
@pytest.mark.parametrize("command", ["pull", "plan"])
def test_a_name_that_no_hub_has_is_refused_without_a_network(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = run_msconv(command, name, *(["--tp", "1"] if command == "plan" else []))
    assert done.code == 2
    assert f"{name}: is no name of a model" in done.stderr


def test_what_an_artifact_has_decided_is_not_asked_of_it(compiled: Path) -> None:
    done = run_msconv(
        "plan", compiled, "--tp", 1, "--roofline", "910B3", "--dtype", "float32", "--max-memory", "1G"
    )
    assert done.code == 2
    assert "--dtype, --max-memory would change nothing" in done.stderr
