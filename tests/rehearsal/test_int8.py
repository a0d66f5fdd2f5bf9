"""Rehearsals of int8 artifacts: the server's path is the same, the reference has their arithmetic."""

from __future__ import annotations

import pytest

from msconv_runtime.artifact import read_manifest
from tests.commands import run_msconv
from tests.rehearsal.conftest import Artifacts
from tests.rehearsal.rehearsing import PROMPTS, every_layout


@every_layout
@pytest.mark.parametrize(
    ("family", "tp", "ep"), [("qwen3", 1, 1), ("qwen3", 2, 1), ("qwen3_moe", 2, 2), ("deepseek_v3", 1, 1)]
)
def test_int8_of_each_family(npu_artifact: Artifacts, family: str, tp: int, ep: int) -> None:
    root = npu_artifact(family, "ascend910b", tp, ep, "w8a8")
    done = run_msconv("rehearse", root, "--json", timeout=500)
    assert done.code == 0, done.stderr
    found = done.json
    assert found["mode"] == "float32"
    assert found["bound"] is None  # a code that goes the other way moves logits by 1e-2
    assert found["answers"]["kl"] < (1e-3 if family == "qwen3" else 1e-2)
    assert found["calls"]["max_abs_logit_error"] == 0
    assert len(found["requests"]) == PROMPTS + 1
    (recorded,) = read_manifest(root).rehearsals_for("ascend910b")
    assert recorded.mode == "float32"
