"""Wrong checkpoints of models with experts, each refused by what is wrong; and odd ones that are not wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv_runtime.errors import CheckpointError, MsconvError, PlanError
from tests.checkpoints import (
    BITS,
    Bits,
    Stored,
    edit_json,
    read_rank,
    read_safetensors,
    write_safetensors,
)
from tests.commands import run_msconv
from tests.conversions import config_of, convert
from tests.moe_checkpoints import (
    widen,
)
from tests.published import deepseek_v3, write_sparse
from tests.stream.moe_models import (
    BLOCK,
    DEEPSEEK,
    Artifacts,
    Models,
    Tensors,
    assert_nothing,
    change,
    check,
    narrow,
    own,
    random_checkpoint,
)
from tests.synthetic import qwen3_config, write_synthetic

pytestmark = pytest.mark.usefixtures("quick")

EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
KV_B = "model.layers.1.self_attn.kv_b_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
NORM = "model.layers.1.input_layernorm.weight"
SCALED = "_scale_inv"
NO_TYPE = "element type float8_e4m3fn is not a weight type"


def refused(source: Path, out: Path, kind: type[MsconvError], tp: int = 2, ep: int = 2, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        convert(source, out, tp, ep=ep, **options)
    assert caught.value.hint
    assert_nothing(out)
    assert out.exists() == (kind is CheckpointError)  # a plan that cannot be leaves no directory
    return caught.value.message


def as_fp8(name: str, scaled: bool = True) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        shape = tensors[name].bits.shape
        tensors[name] = Stored("F8_E4M3", np.full(shape, 0x38, np.uint8))
        if scaled:
            tensors[name + SCALED] = Stored("F32", np.ones([math.ceil(n / 16) for n in shape], np.uint32))

    return edit


def scale_as(code: str, shape: Callable[[Bits], Bits] = lambda bits: bits) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        bits = shape(tensors[EXPERT + SCALED].bits)
        tensors[EXPERT + SCALED] = Stored(code, np.ascontiguousarray(bits).astype(BITS.get(code, np.uint8)))

    return edit


def added(name: str, code: str = "F32", shape: tuple[int, ...] = (1, 1)) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: Stored(code, np.zeros(shape, BITS[code]))})


def without(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


PLANNED: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "no scale": (without(EXPERT + SCALED), ("Missing from the checkpoint (1)", EXPERT + SCALED)),
    "no scale of attention": (without(KV_B + SCALED), ("Missing from the checkpoint (1)", KV_B + SCALED)),
    "scale turned over": (
        lambda t: t.update({KV_B + SCALED: Stored("F32", np.ascontiguousarray(t[KV_B + SCALED].bits.T))}),
        (KV_B + SCALED, "has shape [1, 20]", "blocks of 16x40 need [20, 1]"),
    ),
    "scale of one block more": (
        scale_as("F32", lambda b: np.concatenate([b, b])),
        (EXPERT + SCALED, "has shape [4, 2]", "need [2, 2]"),
    ),
    "flat scale": (scale_as("F32", np.ravel), (EXPERT + SCALED, "has shape [4]", "need [2, 2]")),
    "scale of whole numbers": (scale_as("I32"), (EXPERT + SCALED, "element type int32")),
    "scale of an FP8 router": (as_fp8(ROUTER), (ROUTER, NO_TYPE)),
    "FP8 router": (as_fp8(ROUTER, scaled=False), (ROUTER, NO_TYPE)),
    "FP8 norm": (as_fp8(NORM, scaled=False), (NORM, NO_TYPE)),
    "FP8 norm and scale": (as_fp8(NORM), (NORM, NO_TYPE)),
    "FP8 bias": (
        as_fp8("model.layers.1.mlp.gate.e_score_correction_bias", scaled=False),
        ("e_score_correction_bias", NO_TYPE),
    ),
    "scale of a tensor that is not FP8": (added(NORM + SCALED), ("unknown to this model (1)", NORM + SCALED)),
    "scale of a matrix that is not FP8": (added(ROUTER + SCALED), ("unknown to this model (1)", ROUTER + SCALED)),
    "scale of nothing": (
        added("model.layers.1.mlp.experts.16.up_proj.weight_scale_inv"),
        ("unknown to this model (1)", "experts.16.up_proj.weight_scale_inv"),
    ),
    "a matrix of an expert is missing": (
        without(EXPERT, EXPERT + SCALED),
        ("Missing from the checkpoint (1)", EXPERT),
    ),
    "an expert is missing": (
        lambda t: [t.pop(n) for n in list(t) if ".experts.5." in n and ".layers.1." in n],
        ("Missing from the checkpoint (3)", "model.layers.1.mlp.experts.5.gate_proj.weight"),
    ),
    "an unknown expert": (
        added("model.layers.1.mlp.experts.16.up_proj.weight", "BF16", (32, 56)),
        ("unknown to this model (1)", "model.layers.1.mlp.experts.16.up_proj.weight"),
    ),
    "an expert in a dense layer": (
        added("model.layers.0.mlp.experts.0.up_proj.weight", "BF16", (32, 56)),
        ("unknown to this model (1)", "model.layers.0.mlp.experts.0.up_proj.weight"),
    ),
    "an MTP layer more than announced": (
        added("model.layers.3.enorm.weight", "BF16", (56,)),
        ("unknown to this model (1)", "model.layers.3.enorm.weight"),
    ),
    "another FP8": (
        lambda t: t.update({EXPERT: Stored("F8_E5M2", t[EXPERT].bits)}),
        (EXPERT, "float8_e5m2"),
    ),
}


@pytest.mark.parametrize("case", PLANNED)
def test_headers_that_do_not_fit_together_are_refused_by_name(model: Models, tmp_path: Path, case: str) -> None:
    edit, words = PLANNED[case]
    source = change(own(model("deepseek FP8"), tmp_path), edit)
    message = refused(source, tmp_path / "out", PlanError)
    assert all(word in message for word in words), message


def test_fp8_without_a_word_about_its_blocks_is_refused(model: Models, tmp_path: Path) -> None:
    source = own(model("deepseek FP8"), tmp_path)
    edit_json(source / "config.json", quantization_config=None)
    message = refused(source, tmp_path / "out", PlanError)
    assert "no quantization_config" in message
    assert "model.layers.{1..2}.mlp.experts.{0..15}.up_proj.weight" in message
    assert "unknown to this model" not in message  # the scales are not news
    assert len(message.splitlines()) < 30


def test_blocks_of_another_size_than_the_scales_are_refused(model: Models, tmp_path: Path) -> None:
    source = own(model("deepseek FP8"), tmp_path)
    quantisation = config_of(source)["quantization_config"] | {"weight_block_size": [40, 16]}
    edit_json(source / "config.json", quantization_config=quantisation)
    message = refused(source, tmp_path / "out", PlanError)
    assert "blocks of 40x16 need" in message


def test_quantisation_that_is_announced_and_not_there_is_nothing(tmp_path: Path) -> None:
    """A checkpoint that was dequantised before, with its config.json left as it was."""
    source = random_checkpoint(tmp_path / "model", DEEPSEEK)
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    edit_json(source / "config.json", quantization_config=quantisation)
    convert(source, tmp_path / "out", 2, ep=2)
    check(tmp_path / "out", source, 2, 2, "bfloat16")


def spoil(name: str, *, at: tuple[int, int], value: float) -> Callable[[Tensors], None]:
    """Another scale for a block."""

    def edit(tensors: Tensors) -> None:
        scales = tensors[name + SCALED].bits.copy().view(np.float32)
        scales[at] = value
        tensors[name + SCALED] = Stored("F32", scales.view(np.uint32))

    return edit


def put_codes(name: str, *places: tuple[int, int, int]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        codes = tensors[name].bits.copy()
        for row, column, code in places:
            codes[row, column] = code
        tensors[name] = Stored("F8_E4M3", codes)

    return edit


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [EXPERT, KV_B, "model.layers.1.self_attn.o_proj.weight"])
def test_a_scale_that_is_no_number_is_refused_with_its_block(
    model: Models, tmp_path: Path, name: str, value: float
) -> None:
    source = change(own(model("deepseek FP8"), tmp_path), spoil(name, at=(1, 0), value=value))
    message = refused(source, tmp_path / "out", CheckpointError)
    assert name + SCALED in message
    assert "[1, 0]" in message
    assert str(value) in message


@pytest.mark.parametrize("name", [EXPERT, KV_B, "model.layers.0.mlp.down_proj.weight"])
def test_codes_that_are_no_numbers_are_refused_and_counted(model: Models, tmp_path: Path, name: str) -> None:
    edit = put_codes(name, (17, 3, 0x7F), (2, 30, 0xFF))
    source = change(own(model("deepseek FP8"), tmp_path), edit)
    message = refused(source, tmp_path / "out", CheckpointError)
    assert name in message
    assert "2 of its FP8 codes are no number" in message


def test_codes_that_are_no_numbers_do_no_harm_in_what_is_dropped(
    artifact: Artifacts, model: Models, tmp_path: Path
) -> None:
    edit = put_codes(EXPERT.replace("layers.1", "layers.2"), (17, 3, 0x7F))
    source = change(own(model("deepseek FP8"), tmp_path), edit)
    convert(source, tmp_path / "out", 2, ep=2, drafts=False)
    whole = read_rank(artifact("deepseek FP8", 2, 2), 1).keys()
    assert read_rank(tmp_path / "out", 1).keys() == {n for n in whole if not n.startswith("model.layers.2.")}


@pytest.mark.parametrize("scale", [200.0, 1e5, 1e38])
@pytest.mark.parametrize("name", [EXPERT, KV_B])
def test_fp8_values_beyond_float16_are_refused_and_fit_bfloat16(
    model: Models, tmp_path: Path, name: str, scale: float
) -> None:
    """Also such that float32 cannot hold: they are not let through as infinite."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = Stored("F8_E4M3", np.zeros_like(tensors[name].bits))
        put_codes(name, (17, 3, 0x7E), (18, 4, 0xFE), (2, 7, 0x7E))(tensors)  # 448, -448, 448
        spoil(name, at=(0, 0), value=1.0)(tensors)
        spoil(name, at=(1, 0), value=scale)(tensors)

    source = change(own(model("deepseek FP8"), tmp_path), edit)
    message = refused(source, tmp_path / "out", CheckpointError, dtype="float16")
    assert name in message
    assert "65504" in message
    assert "2 values" in message
    if scale == 200:
        convert(source, tmp_path / "wide", 2, ep=2, dtype="bfloat16")
        check(tmp_path / "wide", source, 2, 2, "bfloat16")


def test_a_large_scale_of_small_codes_fits_float16(model: Models, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in (EXPERT, KV_B):
            tensors[name] = Stored("F8_E4M3", tensors[name].bits & 0x0F)  # at most 2 ** -6 * 1.875
            spoil(name, at=(0, 0), value=1000.0)(tensors)

    source = change(own(model("deepseek FP8"), tmp_path), edit)
    convert(source, tmp_path / "out", 2, ep=2, dtype="float16")
    check(tmp_path / "out", source, 2, 2, "float16")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.5.up_proj.weight", "lm_head.weight"])
def test_plain_values_beyond_float16_are_refused(tmp_path: Path, name: str) -> None:
    source = random_checkpoint(tmp_path / "model", DEEPSEEK)

    def edit(tensors: Tensors) -> None:
        values = widen(tensors[name]).copy()
        values[3, 4] = 1e5
        tensors[name] = Stored("BF16", narrow(values, "BF16"))

    message = refused(change(source, edit), tmp_path / "out", CheckpointError, dtype="float16")
    assert f"{name}: 1 values are beyond float16's range" in message


@pytest.mark.parametrize("scale", [0.0, -0.0, 2.0**-149])
def test_scales_that_are_odd_but_can_be_are_obeyed(model: Models, tmp_path: Path, scale: float) -> None:
    """Of 0 only where all codes of the block are 0."""

    def edit(tensors: Tensors) -> None:
        for name in (EXPERT, KV_B):
            spoil(name, at=(1, 0), value=scale)(tensors)
            if scale == 0:
                codes = tensors[name].bits.copy()
                codes[BLOCK[0] : 2 * BLOCK[0], : BLOCK[1]] &= 0x80
                tensors[name] = Stored("F8_E4M3", codes)

    source = change(own(model("deepseek FP8"), tmp_path), edit)
    convert(source, tmp_path / "out", 2, ep=2)
    check(tmp_path / "out", source, 2, 2, "bfloat16")


@pytest.mark.parametrize("indexed", ["first", "second"])
def test_an_expert_in_two_shards_is_refused(model: Models, tmp_path: Path, indexed: str) -> None:
    source = own(model("deepseek FP8"), tmp_path)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first = index["weight_map"][EXPERT]
    second = next(f for f in sorted(set(index["weight_map"].values())) if f != first)
    tensors = read_safetensors(source / second)
    write_safetensors(source / second, tensors | {EXPERT: Stored("F8_E4M3", np.zeros((32, 56), np.uint8))})
    index["weight_map"][EXPERT] = first if indexed == "first" else second
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", 2, ep=2)
    assert EXPERT in caught.value.message
    assert first in caught.value.message
    assert second in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tp", "ep", "words"),
    [
        (16, 16, ("8 heads do not split over tp=16", "12 experts do not split over ep=16")),
        (8, 1, ("36 rows do not split over the 8 ranks of an expert", "36 columns")),
        (8, 8, ("12 experts do not split over ep=8",)),
    ],
)
def test_layouts_that_do_not_divide_are_refused(tmp_path: Path, tp: int, ep: int, words: tuple[str, ...]) -> None:
    config = DEEPSEEK | {"n_routed_experts": 12, "moe_intermediate_size": 36, "n_shared_experts": 2}
    source = write_sparse(tmp_path / "model", config, deepseek_v3(config))
    message = refused(source, tmp_path / "out", PlanError, tp, ep)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_the_command_line_exits_2_if_ep_does_not_divide_tp(model: Models, tmp_path: Path, command: str) -> None:
    options = ("--model", model("qwen3_moe"), "--tp", 2, "--ep", 4, "--output", tmp_path / "out", "--json")
    done = run_msconv(command, *options)
    assert done.code == 2, done.stdout
    assert done.json["error"]["code"] == "usage"
    assert "ep 4" in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_expert_parallelism_of_a_dense_model_is_refused(tmp_path: Path) -> None:
    source = write_synthetic(tmp_path / "dense", qwen3_config())
    assert "this model has no experts" in refused(source, tmp_path / "out", PlanError)
