"""Graphs of int8 matrices, interpreted, against a reference of the same arithmetic that is led by their codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.verify.int8_runs import Model, Run

pytestmark = pytest.mark.slow

BOUND = 1e-4  # of logits, as everywhere
LED = 1e-3  # of all codes at most, in runs of some thousand
MODELS = (
    Model("qwen3", "dynamic"),
    Model("qwen3 tied", "static", 2, shifted=True),
    Model("qwen3_moe", "mixed", 4, 2, shifted=True),
    Model("qwen3_moe", "dynamic", 2),
    Model("deepseek_v3", "mixed", 4, 2, shifted=True),
    Model("deepseek_v3", "dynamic", 2),
)
CASES = [
    *((model, "ascend910b") for model in MODELS),
    *((model, "cpu") for model in MODELS),
    (MODELS[0], "ascend910c"),
    (MODELS[4], "ascend910c"),
    (MODELS[1], "ascend310p"),
]


def name_of(value: object) -> str:
    return f"{value.name} {value.kind} {value.tp}-{value.ep}" if isinstance(value, Model) else str(value)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("model", "target"), CASES, ids=name_of)
def test_prefill_and_decode_agree_with_the_led_reference(model: Model, target: str) -> None:
    roles = {"prefill": "", "decode": "", **({"verify": ""} if "ascend" in target else {})}
    run = Run(model, target, roles)
    rng = np.random.default_rng(5)
    steps = [[rng.integers(0, 1000, n).tolist() for n in (5, 2, 7)], *(rng.integers(0, 1000, (2, 3, 1)).tolist())]
    plan = ["prefill", "decode", "decode"]
    if "verify" in roles:
        steps.append([[1, 2], [3], [4, 5, 6]])
        plan.append("verify")
    run.begin(3)
    outputs = [run.call(role, tokens) for role, tokens in zip(plan, steps, strict=True)]
    assert max(step.apart for step in outputs) == 0
    counts = [[len(tokens) for tokens in of_step] for of_step in steps]
    matrices = {
        name for p in run.programs.values() for name, (dtype, _) in p.declared.items() if dtype == torch.int8
    }
    for sequence in range(3):
        reference = run.reference(sequence, counts)
        whole = [t for of_step in steps for t in of_step[sequence]]
        wanted, at = reference.logits(whole), 0
        for role, step, of_call in zip(plan, outputs, counts, strict=True):
            at += of_call[sequence]
            found = step.outputs[0][0]
            if role == "verify":
                first = sum(of_call[:sequence])
                rows = found[first : first + of_call[sequence]]
                assert np.abs(rows - wanted[at - len(rows) : at]).max() < BOUND
            else:
                assert np.abs(found[sequence] - wanted[at - 1]).max() < BOUND, (role, sequence)
        lead = reference.lead
        assert lead.unexplained == []
        assert lead.led <= LED * lead.total
        assert {matrix for _, matrix in lead.used} == matrices == {matrix for _, matrix in lead.codes}
