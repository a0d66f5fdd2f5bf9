"""Latent attention, rehearsed: the pool that the graphs take is made, and another one is refused."""

from __future__ import annotations

import re

import pytest

from tests.commands import run_msconv
from tests.rehearsal.conftest import Artifacts
from tests.rehearsal.rehearsing import every_layout, rehearse, rehearse_with

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]


def test_two_ranks_one_of_which_is_killed(npu_artifact: Artifacts) -> None:
    found = rehearse(npu_artifact("deepseek_v3", "ascend910b", 2, 2), "--end", "kill")
    assert found["end_seconds"] < 20
    cached = {r["name"]: r["cached"] for r in found["requests"]}
    assert cached["a cached prefix"] == 128


@every_layout
def test_a_310p(npu_artifact: Artifacts) -> None:
    rehearse(npu_artifact("deepseek_v3", "ascend310p"))


@every_layout
def test_one_rank_in_its_own_precision(npu_artifact: Artifacts) -> None:
    root = npu_artifact("deepseek_v3", "ascend910b")
    rehearse(root)
    done = run_msconv("rehearse", root, "--no-exact", "--prompts", 4, "--json", timeout=500)
    assert done.code == 0, done.stderr
    assert done.json["mode"] == "as served"


@every_layout
def test_a_pool_in_two_parts_is_refused_with_what_it_is(
    npu_artifact: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = npu_artifact("deepseek_v3", "ascend910b", 2, 2)
    said = rehearse_with(root, monkeypatch, "latent split")
    assert re.search(r"SGLang's KV pool has heads and dimension \[1, 32\], the graphs want \[1, 40\]", said)


@every_layout
def test_a_host_read_of_the_pool_is_named_with_its_place(
    npu_artifact: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = rehearse_with(npu_artifact("deepseek_v3", "ascend910b"), monkeypatch, "host read")
    assert re.search(r"the host touched device memory, at .*string_at.*read_the_pool", said)
