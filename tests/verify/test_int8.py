"""Graphs of int8 matrices, interpreted, against a reference of the same arithmetic that is led by their codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msconv.graph.spec import CannotCompute
from tests.every import EVERY
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
QUICK = [  # every family and every kind on each kind of target, and what only one of them has
    *((MODELS[i], "ascend910b") for i in (1, 3, 4)),
    *((MODELS[i], "cpu") for i in (0, 2)),
    *((MODELS[i], "cpu compiled") for i in (0, 2, 5)),
    (MODELS[1], "ascend310p"),
]
ALL = [
    *((model, target) for target in ("ascend910b", "cpu", "cpu compiled") for model in MODELS),
    (MODELS[0], "ascend910c"),
    (MODELS[4], "ascend910c"),
    (MODELS[1], "ascend310p"),
]
CASES = ALL if EVERY else QUICK  # `make test-int8` takes all
PLANS = {
    "cpu": ("prefill", "decode", "decode"),
    "ascend": ("prefill", "decode", "decode", "verify"),
    "compiled": ("mixed", "mixed", "mixed"),
}


def name_of(value: object) -> str:
    return f"{value.name} {value.kind} {value.tp}-{value.ep}" if isinstance(value, Model) else str(value)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def plan_of(target: str) -> tuple[str, ...]:
    """The roles of the graphs, call after call."""
    name, _, variant = target.partition(" ")
    return PLANS[variant or ("cpu" if name == "cpu" else "ascend")]


@pytest.mark.parametrize(("model", "target"), CASES, ids=name_of)
def test_prefill_and_decode_agree_with_the_led_reference(model: Model, target: str) -> None:
    name, _, variant = target.partition(" ")
    plan = plan_of(target)
    run = Run(model, name, dict.fromkeys(plan, variant))
    rng = np.random.default_rng(5)
    steps = [[rng.integers(0, 1000, n).tolist() for n in (5, 2, 7)], *(rng.integers(0, 1000, (2, 3, 1)).tolist())]
    steps = [*steps, [[1, 2], [3], [4, 5, 6]]][: len(plan)]
    run.begin(3)
    outputs = [run.call(role, tokens) for role, tokens in zip(plan, steps, strict=True)]
    assert max(step.apart for step in outputs) == 0
    counts = [[len(tokens) for tokens in of_step] for of_step in steps]
    declared = {name: dtype for p in run.programs.values() for name, (dtype, _) in p.declared.items()}
    matrices = {name for name, dtype in declared.items() if dtype == torch.int8}
    for sequence in range(3):
        reference = run.reference(sequence, counts)
        wanted, at = reference.logits([t for of_step in steps for t in of_step[sequence]]), 0
        for role, step, of_call in zip(plan, outputs, counts, strict=True):
            first, new = sum(of_call[:sequence]), of_call[sequence]
            rows = step.outputs[0][0]
            rows = rows[first : first + new] if role == "verify" else rows[sequence : sequence + 1]
            at += new
            assert np.abs(rows - wanted[at - len(rows) : at]).max() < BOUND, (role, sequence)
        lead = reference.lead
        assert lead.unexplained == []
        assert lead.led <= LED * lead.total
        assert {matrix for _, matrix in lead.used} == matrices == {matrix for _, matrix in lead.codes}


def test_ranks_make_the_same_codes_of_the_same_input() -> None:
    """And other codes of their own columns."""
    run = Run(MODELS[4], "ascend910b", {"prefill": ""})
    run.begin(1)
    run.call("prefill", [[1, 2, 3]])
    (call,) = run.codes.calls
    for matrix in {matrix for _, matrix in call}:
        ranks = [call[rank, matrix] for rank in range(4)]
        same = all(torch.equal(ranks[0].codes, other.codes) for other in ranks)
        if "mlp.experts" in matrix:
            assert all(torch.equal(ranks[0].ids, other.ids) for other in ranks)
            same = torch.equal(ranks[0].codes, ranks[1].codes)  # of the group that has the same experts
        assert same == (not matrix.endswith(("o_proj.weight", "down_proj.weight"))), matrix


def test_a_310p_takes_no_scale_a_token() -> None:
    with pytest.raises(CannotCompute, match=r"ascend310p prefill: .* take no scale a token .*aclnnQuantMatmulV4"):
        Run(MODELS[0], "ascend310p", {"prefill": ""})
    with pytest.raises(CannotCompute, match="take no scale a token"):
        Run(Model("qwen3_moe", "mixed"), "ascend310p", {"prefill": ""})


def test_latent_matrices_must_be_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.int8.kind_of", lambda matrix, kind: "dynamic" if "kv_b_proj" in matrix else "")
    with pytest.raises(CannotCompute, match=r"kv_b_proj_k\.weight is stored as codes"):
        Run(MODELS[5], "cpu", {"decode": ""})


def test_experts_with_one_scale_for_all_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.int8.kind_of", lambda matrix, kind: "static" if "experts" in matrix else "")
    with pytest.raises(CannotCompute, match="only a scale a token is computed"):
        Run(MODELS[3], "ascend910b", {"decode": ""})


def test_what_a_graph_declares() -> None:
    """Scales of experts are bfloat16 on 910B, and those of float16 products int64."""
    declared = {p.name: p.dtype for p in Run(MODELS[2], "ascend910b", {"decode": ""}).exports["decode"].parameters}
    assert declared["model.layers.0.mlp.experts.down_proj.weight_scale"] == "bfloat16"
    assert declared["model.layers.0.self_attn.qkv_proj.deq_scale"] == "float32"
    assert declared["model.layers.0.self_attn.qkv_proj.quant_bias"] == "int32"
    assert declared["model.layers.0.input_layernorm.bias"] == "bfloat16"
    made = Run(MODELS[1], "ascend310p", {"decode": ""}).exports["decode"]
    assert {p.name: p.dtype for p in made.parameters}["model.layers.0.self_attn.qkv_proj.deq_scale"] == "int64"
    assert not any("_proj" in name for name in made.nz)
