"""What is kept in which format, by group: matrices, not what stands beside them, and all bytes of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from msconv.layout.kept import kept_groups
from msconv.quant import formats_named
from msconv_runtime.artifact import read_manifest
from tests.commands import run_msconv
from tests.conversions import convert
from tests.quant.conftest import Int8

pytestmark = pytest.mark.usefixtures("quick")


def test_groups_have_matrices_and_all_bytes(int8: Int8, tmp_path: Path) -> None:
    convert(int8("qwen3_moe", "static with biases"), tmp_path / "out", 2)
    weights = read_manifest(tmp_path / "out").weights
    assert weights is not None
    tensors = [(t.name, t.dtype, t.nbytes) for t in weights.tensors]
    groups = {g.format: g for g in kept_groups(tensors, formats_named(weights.quant))}
    assert list(groups) == ["w8a8-dynamic", "w8a8-static", ""]
    assert groups["w8a8-static"].names == (
        "model.layers.{0..1}.self_attn.qkv_proj.weight",
        "model.layers.{0..1}.self_attn.o_proj.weight",
    )
    assert groups["w8a8-dynamic"].tensors == 4
    assert all("experts" in name or "mlp" in name for name in groups["w8a8-dynamic"].names)
    assert "model.embed_tokens.weight" in groups[""].names
    constants = sum(n for name, _, n in tensors if name in ("vocab_start", "rank_onehot", "expert_start"))
    assert sum(g.nbytes for g in groups.values()) + constants == sum(n for _, _, n in tensors)


def test_a_bias_beside_a_static_matrix_is_a_value() -> None:
    module = "model.layers.0.self_attn.qkv_proj"
    ends = ("deq_scale", "quant_bias", "input_scale", "input_offset")
    tensors = [(f"{module}.weight", "int8", 12), *((f"{module}.{end}", "float32", 4) for end in ends)]
    groups = kept_groups([*tensors, (f"{module}.bias", "bfloat16", 2)], formats_named("w8a8-static"))
    assert [(g.format, g.names, g.nbytes) for g in groups] == [
        ("w8a8-static", (f"{module}.weight",), 28),
        ("", (f"{module}.bias",), 2),
    ]


def test_plan_and_inspect_say_it(int8: Int8, tmp_path: Path) -> None:
    model, out = int8("deepseek_v3", "mixed"), tmp_path / "out"
    planned = run_msconv("plan", "--model", model, "--tp", 2)
    assert "kept        int8 (W8A8, one scale an input): " in planned.stdout, planned.stderr
    convert(model, out, 2)
    shown = run_msconv("inspect", out, "--json").json["weights"]
    assert shown["quant"] == "w8a8-dynamic, w8a8-static"
    assert [f["format"] for f in shown["formats"]] == ["w8a8-dynamic", "w8a8-static", "", ""]
    assert "kv_b_proj_k" in " ".join(shown["formats"][2]["names"])
    assert shown["formats"] == run_msconv("plan", "--model", model, "--tp", 2, "--json").json["kept"]
    assert "as int8 (W8A8, a scale a token): " in run_msconv("inspect", out).stdout
