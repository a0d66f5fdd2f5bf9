"""The wheel beside the packages that SGLang publishes: it changes none of them, both sides import, commands run.

`make test-install` says which environments these are and lets them be made: about 1.5 GB of downloads.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from msconv_runtime.sglang.environment import VERSIONS
from tests.checkpoints import make_qwen3
from tests.hub.server import Hub
from tests.install.environments import HERE, NOT_IN_THE_BASE, Environment, build_wheel, environment, interpreter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not os.environ.get("MSCONV_INSTALL"), reason="makes environments: `make test-install`"),
]

HUB = {"huggingface_hub"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("checkpoint") / "tiny-qwen3", dtype="bfloat16")


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on localhost that has the checkpoint; commands use it."""
    server = Hub()
    server.add("some/tiny-qwen3", checkpoint)
    for key in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET"):
        monkeypatch.delenv(key, raising=False)
    for key, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # that hub does not speak it to clients before 2
    server.home = tmp_path / "hub"
    yield server
    server.stop()


def test_the_wheel_has_types_recipes_and_what_is_no_code(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    recipes = len(list((HERE.parents[1] / "recipes").glob("*.yaml")))
    assert {"msconv/py.typed", "msconv_runtime/py.typed", "msconv_runtime/kernels/int8.cc"} - names == set()
    assert sum(name.startswith("msconv/recipe_files/") and name.endswith(".yaml") for name in names) == recipes
    assert any(name.startswith("msconv/published/") for name in names)
    assert not [name for name in names if name.startswith(("tests", "demo", "benchmarks"))]


def converts(env: Environment, checkpoint: Path, out: Path) -> None:
    """What needs no hub: plan, convert, inspect and report, by the program that pip put there."""
    for command in (
        ("plan", str(checkpoint), "--tp", "2"),
        ("convert", str(checkpoint), "--tp", "2", "--output", str(out)),
        ("inspect", str(out)),
        ("report", str(out)),
    ):
        done = env.run("msconv", *command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert (out / "READY").is_file() and (out / "report.html").is_file()


def asks_a_hub(env: Environment, out: Path, directory: Path) -> None:
    """convert from a hub, push to it and pull from it."""
    again = directory / "from-hub"
    for command in (
        ("convert", "some/tiny-qwen3", "--tp", "2", "--output", str(again)),
        ("push", str(out), "--to", "me/tiny-qwen3-tp2"),
        ("pull", "me/tiny-qwen3-tp2", "--output", str(directory / "pulled")),
    ):
        done = env.run("msconv", *command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    for part in (out / "weights").iterdir():
        assert (again / "weights" / part.name).read_bytes() == part.read_bytes()
        assert (directory / "pulled/weights" / part.name).read_bytes() == part.read_bytes()


def imports_all_but(env: Environment, here: set[str]) -> None:
    found = env.json("imports.py")
    assert found["modules"] > 250
    assert not found["wrong"], found["wrong"]
    missing = set(found["missing"])
    assert missing <= (set(NOT_IN_THE_BASE) | HUB) - here, found["missing"]


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_the_base_alone_converts_and_says_what_a_hub_needs(
    version: str, wheel: Path, checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    with environment(tmp_path / "env", python) as env:
        env.install(wheel)
        assert not HUB & set(env.packages()) and not {"httpx", "httpx2", "torch", "mindspore"} & set(
            env.packages()
        )
        assert env.conflicts() == []
        imports_all_but(env, set())
        converts(env, checkpoint, tmp_path / "out")
        for command in (
            ("convert", "some/tiny-qwen3", "--tp", "2", "--output", "elsewhere"),
            ("push", str(tmp_path / "out"), "--to", "me/tiny"),
            ("pull", "me/tiny"),
        ):
            done = env.run("msconv", *command)
            assert done.returncode == 4, (command, done.stdout, done.stderr)
            assert 'pip install "msconv[hub]"' in done.stderr and "Traceback" not in done.stderr
        assert not hub.requests


@pytest.mark.parametrize(("pins", "version"), [("sglang-npu-0.5.13", "0.5.13"), ("sglang-0.5.23", "0.5.23")])
def test_nothing_that_sglang_pins_is_changed_and_both_sides_import(
    pins: str, version: str, wheel: Path, checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    with environment(tmp_path / "env") as env:
        env.install("-r", HERE / f"{pins}.txt", "-r", HERE / "sglang-imports.txt")
        before = env.packages()
        env.install(f"{wheel}[hub]")
        after = env.packages()
        assert {name: after.get(name) for name in before} == before
        assert env.conflicts() == []
        imports_all_but(env, HUB | {"transformers", "safetensors", "torch"})
        converts(env, checkpoint, tmp_path / "out")
        asks_a_hub(env, tmp_path / "out", tmp_path)
        env.install("--no-deps", f"sglang=={version}")  # with its own pins it would bring CUDA
        sglang_is_whole(env, version)


def sglang_is_whole(env: Environment, version: str) -> None:
    """SGLang imports with msconv beside it.  Its plug-in changes all of the version that it was tried with, and
    nothing of another one that lacks a part, so that other models are served there as ever."""
    found = env.json("sides.py")
    assert found["version"] == version
    assert found["changed"] in (0, found["to change"]) and "Failed to" not in found["log"]
    if version in VERSIONS:
        assert found["changed"] > 20
    else:
        assert found["changed"] == 0 and f"msconv: SGLang {version} has no " in found["log"]
