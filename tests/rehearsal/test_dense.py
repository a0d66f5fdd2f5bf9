"""A dense model, rehearsed: with faults of calls, each caught and named with its call; then without."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from msconv.rehearsal.client import HttpClient
from msconv.rehearsal.plan import Options, Plan, make_plan
from msconv.rehearsal.protocol import CALLS
from msconv.rehearsal.records import read_replicas
from msconv.rehearsal.rehearse import running
from msconv.rehearsal.replay import Replayer
from msconv.rehearsal.server import Server
from msconv_runtime.artifact import read_manifest
from msconv_runtime.errors import VerificationFailed
from tests.commands import run_msconv
from tests.rehearsal.conftest import Artifacts
from tests.rehearsal.rehearsing import BOUND, every_layout, planting_path, rehearse

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]

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
    "decode for a new sequence": r"\(decode\): .*graph: decode for 1 sequences without a cached token",
    "a copy of the pool": r"k_cache\.0: is SGLang's buffer `none`, not `k 0`",
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
        patch.setenv("PYTHONPATH", planting_path())
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
    replayer = Replayer(planted.plan.artifact, planted.plan.target, True, BOUND)
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


@every_layout
@pytest.mark.parametrize(("tp", "target"), [(1, "ascend910b"), (2, "ascend910b"), (1, "ascend910c")])
def test_other_layouts(npu_artifact: Artifacts, tp: int, target: str) -> None:
    rehearse(npu_artifact("qwen3", target, tp))


@every_layout
def test_processes_that_are_started_anew(npu_artifact: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a real NPU."""
    monkeypatch.setenv("MSCONV_REHEARSAL_START", "spawn")
    rehearse(npu_artifact("qwen3", "ascend910b", 2))


@every_layout
def test_two_copies(npu_artifact: Artifacts) -> None:
    root = npu_artifact("qwen3", "ascend310p")
    rehearse(root, "--", "--dp-size=2")
    assert {r.copies for r in read_manifest(root).rehearsals_for("ascend310p")} >= {2}


def test_one_rank_on_a_310p(npu_artifact: Artifacts) -> None:
    """What is recorded is shown."""
    root = npu_artifact("qwen3", "ascend310p")
    rehearse(root, "--", "--log-level=info")
    shown = run_msconv("inspect", root, "--json").json["standing"]["ascend310p"]
    assert not shown["interpreted"]
    assert not shown["run_on_device"]
    entry = shown["rehearsed"][0]
    assert (entry["copies"], entry["flags"], entry["device"]) == (1, ["--log-level=info"], "1")
    words = "not interpreted - rehearsed: SGLang 0.5.23, float32"
    assert words in run_msconv("inspect", root).stdout
    assert words in (root / "report.html").read_text()
