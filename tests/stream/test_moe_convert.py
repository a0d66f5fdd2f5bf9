"""Whole conversions of models with experts: every bit in its place, from any type, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msconv.steps.conversion import run
from msconv.stream.buffers import buffer_sizes
from msconv_runtime.artifact import read_manifest
from tests.checkpoints import (
    read_checkpoint,
)
from tests.commands import run_msconv
from tests.conversions import convert, prepare, with_buffers
from tests.moe_checkpoints import (
    Block,
    add_mtp,
    quantise_fp8,
)
from tests.published import deepseek_v3, write_sparse
from tests.stream.moe_models import (
    BLOCK,
    DEEPSEEK,
    KINDS,
    MESHES,
    QWEN,
    RESHARDED,
    Artifacts,
    Models,
    Tensors,
    change,
    check,
    own,
    random_checkpoint,
    reshard,
    weights_of,
)
from tests.synthetic import digests

pytestmark = pytest.mark.usefixtures("quick")


# Right


@pytest.mark.parametrize(("tp", "ep"), MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_has_its_bits(artifact: Artifacts, model: Models, kind: str, tp: int, ep: int) -> None:
    dtype = KINDS[kind][1] or ("float32" if kind == "deepseek float32" else "bfloat16")
    check(artifact(kind, tp, ep), model(kind), tp, ep, dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"rope_interleave": False},
        {"q_lora_rank": None, "rope_interleave": False},
        {"n_shared_experts": 0},
        {"n_shared_experts": 3},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 2},
        {"qk_rope_head_dim": 2, "n_group": 1, "topk_group": 1},
    ],
)
def test_every_kind_of_deepseek(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = DEEPSEEK | changes
    plain = random_checkpoint(tmp_path / "plain", config)
    if config["n_shared_experts"] == 0:
        change(plain, lambda t: [t.pop(n) for n in list(t) if ".shared_experts." in n])
    fp8 = quantise_fp8(plain, tmp_path / "fp8", BLOCK)
    convert(fp8, tmp_path / "out", 4, ep=2)
    check(tmp_path / "out", fp8, 4, 2, "bfloat16")
    for old, new in (((4, 2), (8, 1)), ((8, 1), (2, 2))):
        source = tmp_path / ("out" if old == (4, 2) else "resharded-8-1")
        out = tmp_path / "resharded-{}-{}".format(*new)
        reshard(source, out, *new)
        check(out, fp8, *new, "bfloat16")


@pytest.mark.parametrize("changes", [{"mlp_only_layers": []}, {"decoder_sparse_step": 2, "mlp_only_layers": []}])
def test_every_kind_of_qwen(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = random_checkpoint(tmp_path / "model", QWEN | changes, "F16", mlp_gate_weight="BF16")
    convert(source, tmp_path / "out", 4, ep=4)
    check(tmp_path / "out", source, 4, 4, "float16")


@pytest.mark.parametrize("block", [(128, 128), (64, 128), (1, 128), (3, 7)])
def test_any_block(model: Models, tmp_path: Path, block: Block) -> None:
    source = quantise_fp8(model("deepseek FP8").with_name("plain"), tmp_path / "model", block, shards=2)
    convert(source, tmp_path / "out", 2, ep=2, dtype="float32")
    check(tmp_path / "out", source, 2, 2, "float32", block)


def test_blocks_of_the_published_size_in_matrices_that_do_not_divide(tmp_path: Path) -> None:
    config = DEEPSEEK | {
        "hidden_size": 320,
        "moe_intermediate_size": 192,
        "intermediate_size": 200,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "q_lora_rank": 129,
        "kv_lora_rank": 136,
    }
    source = quantise_fp8(random_checkpoint(tmp_path / "plain", config), tmp_path / "model")
    convert(source, tmp_path / "out", 4, ep=2)
    check(tmp_path / "out", source, 4, 2, "bfloat16", (128, 128))


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_router_and_bias_of_any_type(tmp_path: Path, code: str) -> None:
    """The router keeps its own, the bias becomes float32; and so they stay from layout to layout."""
    source = random_checkpoint(tmp_path / "model", DEEPSEEK, mlp_gate_weight=code, e_score_correction_bias=code)
    convert(source, tmp_path / "out", 2, ep=2, dtype="float16")
    check(tmp_path / "out", source, 2, 2, "float16")
    reshard(tmp_path / "out", tmp_path / "other", 4, 2)
    check(tmp_path / "other", source, 4, 2, "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("gate", "up"), [("F32", "BF16"), ("BF16", "F32"), ("F16", "BF16")])
def test_gate_and_up_of_two_types(tmp_path: Path, gate: str, up: str, dtype: str) -> None:
    """With --dtype any mixture may come; each tensor is cast from its own type."""
    source = random_checkpoint(tmp_path / "model", QWEN, gate_proj_weight=gate, up_proj_weight=up)
    convert(source, tmp_path / "out", 2, ep=2, dtype=dtype)
    check(tmp_path / "out", source, 2, 2, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("plain", ["gate", "up", "down", "q_b", "kv_b"])
def test_some_matrices_left_out_of_quantisation(model: Models, tmp_path: Path, plain: str, dtype: str) -> None:
    source = own(model("deepseek FP8"), tmp_path)
    whole = read_checkpoint(model("deepseek FP8").with_name("plain"))

    def dequantised(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(f"{plain}_proj.weight") and ".layers.2." not in n]:
            tensors[name] = whole[name]
            del tensors[name + "_scale_inv"]

    change(source, dequantised)
    convert(source, tmp_path / "out", 2, ep=2, dtype=dtype)
    check(tmp_path / "out", source, 2, 2, dtype)


def test_the_manifest_says_what_was_dropped_and_cast(artifact: Artifacts, model: Models) -> None:
    manifest = read_manifest(artifact("deepseek FP8", 4, 2))
    weights, source = manifest.weights, read_checkpoint(model("deepseek FP8"))
    assert weights is not None
    assert (weights.source_dtype, weights.dtype) == ("float8_e4m3fn", "bfloat16")
    mtp = [n for n in source if n.startswith("model.layers.2.")]
    copies = {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"}
    assert {d.name for d in weights.dropped} == copies < set(mtp)
    counted = [n for n in source if n not in mtp and not n.endswith("_scale_inv")]
    assert manifest.model.parameters == sum(source[n].bits.size for n in counted)
    assert len(manifest.model.files) == 4


# The same bytes


@pytest.mark.parametrize("kind", RESHARDED)
@pytest.mark.parametrize("jobs", [1, 3])
def test_workers_and_small_blocks_write_the_same_bytes(
    artifact: Artifacts, model: Models, tmp_path: Path, kind: str, jobs: int
) -> None:
    for tp, ep in ((2, 1), (8, 4)):
        convert(model(kind), tmp_path / f"jobs-{tp}", tp, ep=ep, jobs=jobs)
        assert digests(tmp_path / f"jobs-{tp}") == digests(artifact(kind, tp, ep))
        conversion = prepare(model(kind), tp, ep, output=tmp_path / f"blocks-{tp}", jobs=jobs)
        run(with_buffers(conversion, buffer_sizes(conversion.plan)))
        assert digests(tmp_path / f"blocks-{tp}") == digests(artifact(kind, tp, ep))


@pytest.mark.parametrize("kind", ["qwen3_moe as float16", "deepseek FP8 as float16", "deepseek FP8 as float32"])
def test_small_blocks_of_a_cast_write_the_same_bytes(
    artifact: Artifacts, model: Models, tmp_path: Path, kind: str
) -> None:
    conversion = prepare(model(kind), 4, 2, KINDS[kind][1], tmp_path / "out", jobs=2)
    run(with_buffers(conversion, buffer_sizes(conversion.plan)))
    assert digests(tmp_path / "out") == digests(artifact(kind, 4, 2))


@pytest.mark.parametrize("seed", [1, 2])
def test_shards_do_not_matter(artifact: Artifacts, model: Models, tmp_path: Path, seed: int) -> None:
    """Scales and tensors dealt to shards in another way give the same weights."""
    plain = model("deepseek FP8").with_name("plain")
    source = add_mtp(quantise_fp8(plain, tmp_path / "model", BLOCK, shards=(1, 7)[seed - 1], seed=seed))
    convert(source, tmp_path / "out", 4, ep=2)
    assert weights_of(tmp_path / "out") == weights_of(artifact("deepseek FP8", 4, 2))


# Memory


def wide_config(**changes: Any) -> dict[str, Any]:
    """Layers wide enough for tables of values to count, 50 MB of FP8."""
    wide = {"hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 1024, "vocab_size": 512}
    wide |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "n_shared_experts": 1}
    return DEEPSEEK | wide | changes


def peak_and_plan(source: Path, out: Path) -> tuple[int, int]:
    """What a conversion needed at most, and what was planned."""
    planned = prepare(source, 4, 2, output=out, jobs=2).planned_memory_bytes
    options = ("--model", source, "--tp", 4, "--ep", 2, "--jobs", 2, "--json", "--output", out)
    done = run_msconv("convert", *options)
    assert done.code == 0, done.stderr
    return done.json["peak_rss_bytes"], planned


@pytest.mark.parametrize("block", [(128, 128), (1, 128)])
def test_fp8_keeps_the_planned_memory(tmp_path: Path, block: Block) -> None:
    """Tables of a block's values and the code that looks them up count too."""
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    config = wide_config(quantization_config=quantisation)
    peak, planned = peak_and_plan(
        write_sparse(tmp_path / "model", config, deepseek_v3(config), 2), tmp_path / "out"
    )
    assert peak <= planned


def test_turning_over_keeps_the_planned_memory(tmp_path: Path) -> None:
    """So does the code that turns matrices over, FP8 or not."""
    config = wide_config(n_routed_experts=2, n_group=1, topk_group=1)
    peak, planned = peak_and_plan(
        write_sparse(tmp_path / "model", config, deepseek_v3(config), 2), tmp_path / "out"
    )
    assert peak <= planned
