"""Experts, rehearsed: two ranks; then with wrong weights, casts and groups."""

from __future__ import annotations

import re

import pytest

from msconv_runtime.artifact import read_manifest
from tests.rehearsal.conftest import Artifacts
from tests.rehearsal.rehearsing import every_layout, rehearse, rehearse_with

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]


@every_layout
def test_experts_of_two_ranks(npu_artifact: Artifacts) -> None:
    root = npu_artifact("qwen3_moe", "ascend910c", 2, 2)
    found = rehearse(root)
    assert found["server"]["tp_size"] == found["server"]["ep_size"] == 2
    (entry,) = read_manifest(root).rehearsals_for("ascend910c")
    assert (entry.machines, entry.copies, entry.mode, entry.sglang) == (1, 1, "float32", "0.5.23")
    assert entry.calls == found["calls"]["by_graph"]


@every_layout
@pytest.mark.parametrize(("target", "tp", "ep"), [("ascend910b", 1, 1), ("ascend310p", 2, 1)])
def test_experts_in_other_layouts(npu_artifact: Artifacts, target: str, tp: int, ep: int) -> None:
    rehearse(npu_artifact("qwen3_moe", target, tp, ep))


@every_layout
def test_experts_on_two_machines(npu_artifact: Artifacts) -> None:
    root = npu_artifact("qwen3_moe", "ascend910c", 2, 2)
    rehearse(root, "--nnodes", 2)
    assert {r.machines for r in read_manifest(root).rehearsals_for("ascend910c")} >= {2}


def test_wrong_weights_casts_and_groups_are_named(
    npu_artifact: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = npu_artifact("qwen3_moe", "ascend910c", 2, 2)
    said = rehearse_with(root, monkeypatch, "expert_start", "NZ", "another group")
    assert "weights of rank 1: expert_start: the values are those of rank 0's file" in said
    assert "weights of rank 0: model.embed_tokens.weight: cast to NZ, and not in the manifest's list" in said
    assert re.search(r"groups of rank 0: world:0 has the communicator 0x\w+; SGLang's", said)
    assert "logits of rank" in said
    assert all(r.machines == 2 for r in read_manifest(root).rehearsed), "a rehearsal that failed is recorded"


@every_layout
def test_another_ranks_file_is_named(npu_artifact: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    root = npu_artifact("qwen3_moe", "ascend910c", 2, 2)
    said = rehearse_with(root, monkeypatch, "another rank's file")
    assert re.search(r"weights of rank 1: .* and \d+ more: the values are those of rank 0's file", said)
