"""Drafts, rehearsed: SGLang's own workers for NPUs, with stand-ins for the kernels that they call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from msconv.rehearsal.build import build_device
from msconv.rehearsal.protocol import Device
from msconv.rehearsal.server import environment, prepare
from msconv_runtime.draft_kinds import LAYER_IDS
from tests.checkpoints import make_qwen3
from tests.commands import run_msconv
from tests.eagle3_checkpoints import make_eagle3
from tests.moe_checkpoints import add_mtp, make_deepseek_v3
from tests.rehearsal.rehearsing import BOUND, PROMPTS, every_layout
from tests.warm import run_warm

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]

TARGET, STEPS = "ascend910b", 3
SAME = """
import torch
from sglang.kernels.ops.speculative import cache_locs, spec_tree
from sglang.srt.speculative.eagle_utils import organize_draft_results
from sglang.srt.speculative.spec_utils import select_top_k_tokens

def guesses(batch, topk, steps, count):
    probabilities = lambda rows: torch.rand(rows, topk).sort(-1, descending=True).values
    scores, lists = None, ([], [], [])
    for i in range(steps):
        p, tokens = probabilities(batch if i == 0 else batch * topk), None
        tokens = torch.randint(0, 5, p.shape)
        _, _, scores, told = select_top_k_tokens(i, p, tokens, None, scores, topk)
        for one, part in zip(lists, told):
            one.append(part)
    return organize_draft_results(*lists, count)

torch.manual_seed(0)
accepted = 0
for batch, topk, steps, count, mode in ((3, 1, 3, 4, 0), (2, 3, 3, 8, 0), (2, 4, 2, 6, 1)):
    parents, chosen, drafts = guesses(batch, topk, steps, count)
    lengths = torch.randint(1, 9, (batch,))
    size = int(lengths.sum()) * count * (mode == 0) + batch * count * count
    outputs = []
    for kernel in (torch.ops.npu.build_tree_kernel_efficient, spec_tree.sgl_build_tree_kernel_triton):
        mask = torch.ones(size, dtype=torch.bool).npu()
        places = torch.full((batch * count,), -7).npu()
        links = [torch.full((batch, count), -1).npu() for _ in range(3)]
        given = (parents.npu(), chosen.npu(), lengths.npu(), mask, places, *links)
        kernel(*given, topk, steps, count, spec_tree.TreeMaskMode(mode))
        outputs.append([mask.cpu(), places.cpu(), *(l.cpu() for l in links)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs)), (topk, mode, outputs)
    tokens = torch.cat((torch.zeros(batch, 1, dtype=torch.long), drafts), 1).npu()
    wanted = torch.randint(0, 5, (batch, count)).npu()
    found = []
    for kernel in (spec_tree.verify_tree_greedy_func, spec_tree.verify_tree_greedy_triton):
        predicted = torch.zeros(batch * count, dtype=torch.int32).npu()
        index = torch.full((batch, steps + 1), -1, dtype=torch.int32).npu()
        numbers = torch.zeros(batch, dtype=torch.int32).npu()
        kernel(predicted, index, numbers, tokens, *links, wanted)
        found.append([predicted.cpu(), index.cpu(), numbers.cpu()])
    assert all(torch.equal(a, b) for a, b in zip(*found)), (topk, found)
    accepted += int(found[0][2].sum())
assert accepted > 0, "no guess was right: nothing is shown"
table = torch.randperm(60, dtype=torch.int32).view(3, 20).npu()
rows, begin = torch.tensor([2, 0]).npu(), torch.tensor([3, 7]).npu()
ends = begin + torch.tensor([4, 4]).npu()
ours = cache_locs.assign_extend_cache_locs_func(rows, table, begin, ends, 2, 4, "npu")
its = torch.empty(8, dtype=torch.int64).npu()
cache_locs.assign_extend_cache_locs[(2,)](rows, table, begin, ends, its, 20, 2)
assert torch.equal(ours.cpu().long(), its.cpu())
print("the same")
"""


def test_the_kernels_do_what_those_for_other_devices_do(tmp_path: Path) -> None:
    """SGLang's Triton kernels, by Triton's interpreter."""
    prepare(tmp_path, Device(str(build_device()), 1, 1 << 30, "Ascend910B2", 2201, True))
    done = subprocess.run(
        [sys.executable, "-c", SAME],
        env=environment(tmp_path, os.environ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.endswith("the same\n"), done.stderr


def run(*line: object) -> None:
    done = run_warm(*line, timeout=600)
    assert done.code == 0, done.stderr


def artifact_of(model: Path, root: Path, tp: int = 1, *compiled: object) -> Path:
    run("convert", "--model", model, "--tp", tp, "--output", root)
    run("compile", root, "--target", TARGET, *compiled)
    return root


def rehearse(root: Path, algorithm: str, draft: Path | None = None) -> dict[str, Any]:
    """All prompts, in float32."""
    flags = ["--speculative-algorithm", algorithm, "--speculative-num-steps", STEPS]
    flags += ["--speculative-eagle-topk", 1, "--speculative-num-draft-tokens", STEPS + 1]
    flags += ["--speculative-draft-model-path", draft] if draft else []
    done = run_msconv("rehearse", root, "--json", "--", *flags, timeout=800)
    assert done.code == 0, done.stderr
    found: dict[str, Any] = done.json
    assert found["ok"] and found["problems"] == []
    assert len(found["requests"]) == PROMPTS + 1
    answers, calls = found["answers"], found["calls"]
    assert answers["equal"] + answers["ties"] == answers["tokens"] >= 12 * 16
    assert max(answers["max_abs_logit_error"], calls["max_abs_logit_error"]) < BOUND
    assert {"prefill", "verify"} < set(calls["by_graph"])
    return found


@every_layout
@pytest.mark.parametrize("tp", [1, 2])
def test_a_layer_of_deepseek_v3(tp: int, tmp_path: Path) -> None:
    long = {"max_position_embeddings": 2048}
    model = add_mtp(make_deepseek_v3(tmp_path / "model", dtype="bfloat16", initializer_range=0.2, **long))
    calls = rehearse(artifact_of(model, tmp_path / "artifact", tp), "NEXTN")["calls"]["by_graph"]
    assert {"draft_extend", "draft_decode"} < set(calls)


@every_layout
@pytest.mark.parametrize("algorithm", ["EAGLE3", "STANDALONE"])
def test_a_draft_that_is_another_artifact(algorithm: str, tmp_path: Path) -> None:
    model = make_qwen3(tmp_path / "model", dtype="bfloat16", initializer_range=0.2)
    if algorithm == "STANDALONE":  # a copy of the target: the same graphs, twice
        target = artifact_of(model, tmp_path / "target")
        draft = Path(shutil.copytree(target, tmp_path / "draft"))
        named = {"draft prefill", "draft decode"}
    else:
        draft = artifact_of(
            make_eagle3(tmp_path / "eagle3", eagle_config={LAYER_IDS: [0, 1, 2]}), tmp_path / "draft"
        )
        target = artifact_of(model, tmp_path / "target", 1, "--draft", draft)
        named = {"draft_extend", "draft_decode"}
    assert named < set(rehearse(target, algorithm, draft)["calls"]["by_graph"])
