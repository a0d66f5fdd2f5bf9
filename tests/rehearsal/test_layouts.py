"""`msconv rehearse`: the real SGLang server on its NPU path, for the families and layouts that can run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msconv_runtime.artifact import read_manifest
from tests.commands import run_msconv
from tests.rehearsal.conftest import Artifacts

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]

BOUND = 1e-4
PROMPTS = 13  # all of the scenario


def rehearse(root: Path, *args: object) -> dict[str, Any]:
    done = run_msconv("rehearse", root, *args[:-1], "--json", *args[-1:], timeout=500)
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
    assert set(calls["by_graph"]) == {"prefill", "decode"}
    assert found["problems"] == []
    assert "--no-strict-aot" not in found["command"]
    return found


def test_experts_on_two_machines(npu_artifact: Artifacts) -> None:
    root = npu_artifact("qwen3_moe", "ascend910c", 2, 2)
    found = rehearse(root, "--nnodes", 2)
    assert found["server"]["tp_size"] == found["server"]["ep_size"] == 2
    (entry,) = read_manifest(root).rehearsals_for("ascend910c")
    assert (entry.machines, entry.copies, entry.mode, entry.sglang) == (2, 1, "float32", "0.5.23")
    assert entry.calls == found["calls"]["by_graph"]


def test_latent_attention_of_two_ranks_one_of_which_is_killed(npu_artifact: Artifacts) -> None:
    found = rehearse(npu_artifact("deepseek_v3", "ascend910b", 2, 2), "--end", "kill")
    assert found["end_seconds"] < 20
    cached = {r["name"]: r["cached"] for r in found["requests"]}
    assert cached["a cached prefix"] == 128


def test_two_copies_of_a_dense_model_on_a_310p(npu_artifact: Artifacts) -> None:
    """What is recorded is shown."""
    root = npu_artifact("qwen3", "ascend310p")
    rehearse(root, "--", "--dp-size=2")
    shown = run_msconv("inspect", root, "--json").json["standing"]["ascend310p"]
    assert not shown["interpreted"]
    assert not shown["run_on_device"]
    (entry,) = shown["rehearsed"]
    assert (entry["copies"], entry["flags"], entry["device"]) == (2, ["--dp-size=2"], "1")
    words = "not interpreted - rehearsed: SGLang 0.5.23, 2 copies, float32"
    assert words in run_msconv("inspect", root).stdout
    assert words in (root / "report.html").read_text()
