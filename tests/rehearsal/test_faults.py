"""Faults planted in a server on the rehearsal device: each is caught, and the call or the place is named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from msconv.rehearsal.client import HttpClient
from msconv.rehearsal.plan import Options, Plan, make_plan
from msconv.rehearsal.records import CALLS, read_replicas
from msconv.rehearsal.rehearse import running
from msconv.rehearsal.replay import Replayer
from msconv.rehearsal.server import Server
from msconv_runtime.errors import VerificationFailed
from tests.commands import run_msconv
from tests.rehearsal.conftest import Artifacts

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]

PLANTING = Path(__file__).with_name("planting")
BOUND = 1e-4
FAULTS = {
    "mask of zeros": r"\(decode\): rank 0: attention_mask: \d+ of \d+ values are wrong",
    "mask of one": r"\(prefill\): rank 0: attention_mask: \d+ of 16384 values are wrong",
    "slots off by one": r"slots: \d+ to \d+ of sequence 0; by its block_tables",
    "positions off by one": r"positions: .* of sequence 0, whose context_lens is",
    "contexts without the new token": r"context_lens|positions: .* of sequence 0, whose context_lens is",
    "tables of another stride": r"block_tables: sequence 0 has a page twice",
    "layers exchanged": r"k_cache\.0: is SGLang's buffer `k 1`, not `k 0`",
    "keys and values exchanged": r"k_cache\.0: is SGLang's buffer `v 0`, not `k 0`",
    "pages of 16": r"k_cache\.0: is \[\d+, 16, 1, 32\]; SGLang's pages have 128 slots",
    "another batch on rank 1": r"input_ids: differs between rank 0 and rank 1",
    "prefill for a cached prefix": r"\(prefill\): .*graph: prefill for sequences with \[128\] cached tokens",
}
ENDS = "prefill for a cached prefix"  # the server, as it would on a device: the last one


@dataclass
class Planted:
    """A running server, the file that names the fault that is on, and the calls at which each began and ended."""

    plan: Plan
    server: Server
    work: Path
    now: Path
    spans: dict[str, tuple[int, int]]

    @property
    def num_calls(self) -> int:
        return read_replicas(self.work / CALLS)[0][0].num_calls


@pytest.fixture(scope="module")
def planted(npu_artifact: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    """One server for all faults of calls: each is on for a prompt of its own."""
    root = npu_artifact("qwen3", "ascend910b", 2)
    work, now = tmp_path_factory.mktemp("planted"), tmp_path_factory.mktemp("now") / "fault"
    plan = make_plan(root, Options())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PLANTING), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("PLANTED_NOW", str(now))
        with running(plan, work) as server:
            found = Planted(plan, server, work, now, {})
            for name in FAULTS:
                ask(found, name)
        yield found


def ask(planted: Planted, fault: str) -> None:
    """A new prompt, and one that has its beginning cached, with the fault on for the second."""
    client = HttpClient(planted.server, planted.plan.config.max_positions, 120)
    rng = np.random.default_rng(len(planted.spans))
    base, rest = (rng.integers(0, planted.plan.config.vocab, n).tolist() for n in (150, 20))
    client.generate(base, 2)
    begin = planted.num_calls
    planted.now.write_text(fault)
    client.generate(rest[:7], 2)
    if fault == ENDS:
        with pytest.raises(VerificationFailed, match="cannot be run"):
            client.generate([*base[:140], *rest], 2)
    else:
        (_, cached), *_ = client.generate([*base[:140], *rest], 2)
        assert cached == 128
    planted.now.write_text("")
    planted.spans[fault] = (begin, planted.num_calls)


@pytest.fixture(scope="module")
def problems(planted: Planted) -> dict[str, list[str]]:
    """By fault, what the calls have that were made while it was on."""
    replicas = read_replicas(planted.work / CALLS)
    replayer = Replayer(planted.plan.root, planted.plan.manifest, planted.plan.target, True, BOUND)
    found = replayer.run(replicas[0], planted.plan.scenario.page, whole=False, enough=10**6).problems
    numbers = [int(re.match(r"call (\d+) ", p)[1]) for p in found]  # type: ignore[index]
    sorted_in = {
        fault: [p for p, n in zip(found, numbers, strict=True) if begin <= n < end]
        for fault, (begin, end) in planted.spans.items()
    }
    assert sum(map(len, sorted_in.values())) == len(found), "problems of calls without a fault"
    return sorted_in


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_call_is_named(problems: dict[str, list[str]], fault: str) -> None:
    assert problems[fault], fault
    assert re.search(FAULTS[fault], problems[fault][0]), problems[fault][:3]


def rehearse(root: Path, monkeypatch: pytest.MonkeyPatch, *faults: str) -> str:
    """With faults that are there from the start: what the command says."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(PLANTING), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    monkeypatch.setenv("PLANTED_AT_LOAD", ",".join(faults))
    done = run_msconv("rehearse", root, "--prompts", 1, timeout=400)
    assert done.code == 3, done.stderr
    return done.stderr


def test_wrong_weights_casts_and_groups_are_named(
    npu_artifact: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = npu_artifact("qwen3_moe", "ascend310p", 2, 2)
    said = rehearse(root, monkeypatch, "expert_start", "NZ", "another group")
    assert "weights of rank 1: expert_start: the values are those of rank 0's file" in said
    assert "weights of rank 0: model.embed_tokens.weight: cast to NZ, and not in the manifest's list" in said
    assert re.search(r"groups of rank 0: world:0 has the communicator 0x\w+; SGLang's", said)
    assert "logits of rank" in said


def test_a_latent_pool_in_two_parts_is_refused_before_it_is_used(
    npu_artifact: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = rehearse(npu_artifact("deepseek_v3", "ascend910b"), monkeypatch, "latent split")
    assert re.search(r"SGLang's KV pool has heads and dimension \[1, 32\], the graphs want \[1, 40\]", said)
