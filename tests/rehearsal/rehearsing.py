"""`msconv rehearse` as people run it, with and without faults that are planted in the server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_msconv
from tests.every import one_of_many

# CI takes the layouts in which most can go wrong; `make test-rehearsal` takes all that can run here
every_layout = one_of_many("test-rehearsal")
BOUND = 1e-4
PROMPTS = 15  # all of the scenario
PLANTING = Path(__file__).with_name("planting")


def planting_path() -> str:
    """PYTHONPATH with the plug-in that plants faults."""
    return os.pathsep.join([str(PLANTING), *filter(None, [os.environ.get("PYTHONPATH")])])


def rehearse(root: Path, *args: object) -> dict[str, Any]:
    """All prompts of the scenario, and all must agree: what --json says."""
    done = run_msconv("rehearse", root, "--json", *args, timeout=500)
    assert done.code == 0, done.stderr
    found = done.json
    assert found["ok"]
    assert found["mode"] == "float32"
    wanted = {"device": "npu", "attention_backend": "ascend", "page_size": 128, "model_impl": "mindspore"}
    assert wanted.items() <= found["server"].items()
    answers, calls = found["answers"], found["calls"]
    assert len(found["requests"]) == PROMPTS + 1  # one of them has two answers
    assert answers["tokens"] >= 12 * 16
    assert answers["equal"] + answers["ties"] == answers["tokens"]
    assert answers["max_abs_logit_error"] < BOUND
    assert calls["max_abs_logit_error"] < BOUND
    assert set(calls["by_graph"]) == {"prefill", "decode", "verify"}
    assert found["problems"] == []
    assert "--no-strict-aot" not in found["command"]
    return found


def rehearse_with(root: Path, monkeypatch: pytest.MonkeyPatch, *faults: str) -> str:
    """One prompt, with faults that are there from the start: what the command says."""
    monkeypatch.setenv("PYTHONPATH", planting_path())
    monkeypatch.setenv("PLANTED_AT_LOAD", ",".join(faults))
    done = run_msconv("rehearse", root, "--prompts", 1, timeout=400)
    assert done.code == 3, done.stderr
    return done.stderr
