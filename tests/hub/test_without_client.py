"""An environment without the hub's client: what asks no hub works, the rest says what to install."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import run_python
from tests.hub.conftest import NAME
from tests.hub.server import Hub

# `msconv` where huggingface_hub and what it speaks HTTP with are not installed
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Blind(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in ("huggingface_hub", "httpx", "httpx2", "modelscope")
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Blind
from msconv.cli import main
main()
"""


def test_what_asks_no_hub_works(shards: Path, expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for command in (
        ("plan", shards, "--tp", 4),
        ("convert", shards, "--tp", 4, "--output", out),
        ("inspect", out, "--check"),
        ("report", out),
        ("reshard", out, "--tp", 2, "--output", tmp_path / "other"),
    ):
        done = run_python(WITHOUT, *command)
        assert done.code == 0, (command, done.stderr)
    linted = run_python(WITHOUT, "lint", shards)
    assert "values" in linted.stderr and linted.code == 1  # random bits are found to be odd numbers
    for part in (expected / "weights").iterdir():
        assert (out / "weights" / part.name).read_bytes() == part.read_bytes()


@pytest.mark.parametrize("more", [(), ("--source", "modelscope")], ids=["huggingface", "modelscope"])
def test_converting_from_a_hub_says_what_to_install(hub: Hub, tmp_path: Path, more: tuple[str, ...]) -> None:
    done = run_python(WITHOUT, "convert", NAME, "--tp", 4, "--output", tmp_path / "out", *more)
    assert done.code == 4, done.stderr
    assert 'pip install "msconv[hub]"' in done.stderr and "Traceback" not in done.stderr
    assert "directory of a checkpoint" in done.stderr
    assert not hub.requests and not (tmp_path / "out").exists()


def test_push_and_pull_say_what_to_install(hub: Hub, expected: Path) -> None:
    for command in (("push", expected, "--to", "me/model"), ("pull", "me/model")):
        done = run_python(WITHOUT, *command)
        assert done.code == 4, done.stderr
        assert done.stderr.startswith(f"Error: msconv {command[0]}: the hub's client (huggingface_hub)")
        assert 'pip install "msconv[hub]"' in done.stderr
    assert not hub.requests
