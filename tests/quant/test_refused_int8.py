"""Quantised checkpoints that are not read, or that contradict themselves: refused by name, all at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv_runtime.errors import MsconvError
from tests.checkpoints import BITS, Stored, edit_json, read_checkpoint, read_rank
from tests.commands import run_msconv
from tests.conversions import convert, prepare
from tests.int8_checkpoints import (
    DESCRIPTION,
    Form,
    Tensors,
    all_static,
    modelslim,
    static_attention,
    write_shards,
)
from tests.quant.conftest import Int8

pytestmark = pytest.mark.usefixtures("quick")

LAYER = "model.layers.0."
Q, OUT, UP = LAYER + "self_attn.q_proj", LAYER + "self_attn.o_proj", LAYER + "mlp.up_proj"
Describe = Callable[[dict[str, Any]], object]


def described(model: Path, change: Describe) -> Path:
    """Change the description."""
    path = model / DESCRIPTION
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return model


def edited(model: Path, change: Callable[[Tensors], object]) -> Path:
    """Change tensors, and not the description."""
    tensors = {n: Stored(t.code, t.bits.copy()) for n, t in read_checkpoint(model).items()}
    change(tensors)
    for path in (*model.glob("*.safetensors"), *model.glob("*.index.json")):
        path.unlink()
    write_shards(model, tensors)
    return model


def refused(model: Path, tmp_path: Path, *words: str, **options: Any) -> MsconvError:
    """It is, before anything is written, in one message with all of these words."""
    with pytest.raises(MsconvError) as error:
        convert(model, tmp_path / "out", **options)
    message = error.value.message
    for word in words:
        assert word in message, message
    assert error.value.hint
    assert not list(tmp_path.glob("out/weights/*.safetensors"))
    return error.value


@pytest.fixture
def own(int8: Int8, tmp_path: Path) -> Int8:
    return lambda family, form: Path(shutil.copytree(int8(family, form), tmp_path / "own"))


def set_type(kind: str, *names: str) -> Describe:
    return lambda values: values.update(dict.fromkeys(names, kind))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_type("W4A8_DYNAMIC", UP + ".weight", UP + ".weight_scale"), ("W4A8_DYNAMIC", "4 bits", "2: ", UP)),
        (lambda d: d.update(kv_cache_type="C8", kv_quant_type="C8"), ("C8", "int8 cache of keys and values")),
        (lambda d: d.update(fa_quant_type="FAKQuant"), ("FAKQuant", "int8 attention")),
        (set_type("W8A8_MXFP8", UP + ".weight"), ("W8A8_MXFP8", "MX formats")),
        (set_type("W4A4_FLATQUANT_DYNAMIC", UP + ".weight"), ("FlatQuant",)),
        (set_type("FLOAT", LAYER + "self_attn.o_proj.left_trans"), ("FlatQuant's matrices", "left_trans")),
        (set_type("FLOAT", "model.heads_rotation"), ("QuaRot", "heads_rotation")),
        (
            lambda d: d.update(metadata={"quarot": {"seed": 1}}),
            ("metadata", "quarot", "rotations change the graph"),
        ),
        (lambda d: d.update(optional={"quarot": {"seed": 1}}), ("optional", "quarot")),
        (lambda d: d.update(group_size=128), ("group_size = 128", "one scale a row")),
        (set_type("FLOAT", LAYER + "self_attn.k_proj.kv_cache_scale"), ("int8 cache", "kv_cache_scale")),
        (set_type("FLOAT", LAYER + "mlp.down_proj.div.mul_scale"), ("a factor before a product",)),
        (set_type("W2A2_INVENTED", UP + ".weight"), ("W2A2_INVENTED", "not a known type")),
        (lambda d: d.update({UP + ".weight": 8}), ("8: on no list",)),
    ],
)
def test_what_would_change_the_graph_is_refused_by_name(
    own: Int8, tmp_path: Path, change: Describe, words: tuple[str, ...]
) -> None:
    refused(described(own("qwen3", "dynamic"), change), tmp_path, DESCRIPTION, *words)


def test_all_that_would_change_the_graph_is_said_at_once(own: Int8, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values.update(group_size=64, kv_cache_type="C8", metadata={"quarot": {}})
        values[UP + ".weight"] = "W4A8_DYNAMIC"

    refused(
        described(own("qwen3", "dynamic"), change), tmp_path, "group_size", "C8", "rotations", "W4A8_DYNAMIC", UP
    )


def test_a_description_that_disagrees_with_the_tensors_is_listed_whole(own: Int8, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values[Q + ".weight"] = "FLOAT"
        values["lm_head.weight"] = "W8A8_DYNAMIC"
        values["model.layers.7.nothing.weight"] = "W8A8_DYNAMIC"
        del values["model.norm.weight"]

    refused(
        described(own("qwen3", "dynamic"), change),
        tmp_path,
        f"described as FLOAT in {DESCRIPTION}, and of type int8 (1): {Q}.weight",
        "described as W8A8_DYNAMIC",
        "lm_head.weight",
        "in no file (1): model.layers.7.nothing.weight",
        f"not described in {DESCRIPTION} (1): model.norm.weight",
    )


def test_scales_of_the_wrong_shape_are_named_with_the_right_one(own: Int8, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[Q + ".weight_scale"] = Stored("F32", tensors[Q + ".weight_scale"].bits[:-1])
        tensors[OUT + ".weight_scale"] = Stored("F32", tensors[OUT + ".weight_scale"].bits[:, 0])

    refused(
        edited(own("qwen3", "dynamic"), change),
        tmp_path,
        f"{Q}.weight_scale: has shape [31, 1]",
        "[32, 1]",
        f"{OUT}.weight_scale: has shape [40], ",
        "[40, 1]",
    )


def test_scales_that_are_missing_or_of_another_type_are_named(own: Int8, tmp_path: Path) -> None:
    model = own("qwen3", "static")

    def change(tensors: Tensors) -> None:
        del tensors[Q + ".input_scale"]
        tensors[OUT + ".quant_bias"] = Stored("F32", tensors[OUT + ".quant_bias"].bits)

    described(model, lambda values: values.pop(Q + ".input_scale"))
    refused(
        edited(model, change), tmp_path, f"{Q}.input_scale", "Missing", f"{OUT}.quant_bias: element type float32"
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [("W8A8_DYNAMIC", "a scale a token"), ("FLOAT", "is plain")],
)
def test_matrices_that_are_one_and_not_alike_are_refused_by_name(
    source: Int8, tmp_path: Path, kind: str, words: str
) -> None:
    def types(name: str) -> str:
        return kind if name in (Q + ".weight", LAYER + "mlp.gate_proj.weight") else all_static(name)

    model = modelslim(source("qwen3", "BF16"), tmp_path / "model", types)
    error = refused(
        model, tmp_path, "qkv_proj.weight", "gate_up_proj.weight", f"{Q}.weight is ", words, "scale an input"
    )
    assert "alike" in error.hint


@pytest.mark.parametrize("form", ["dynamic", "static", "mixed", "compressed"])
def test_what_is_quantised_is_not_quantised_again(int8: Int8, tmp_path: Path, form: str) -> None:
    family = "qwen3" if form == "static" else "qwen3_moe"
    error = refused(int8(family, form), tmp_path, "model.layers.{0..1}", "already", quant="w8a8")
    assert "--quant" in error.hint


def test_offsets_of_weights_are_refused_all_at_once(own: Int8, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for layer in (0, 1):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight_offset"].bits[3] = np.float32(4).view(np.uint32)

    model = edited(own("qwen3", "dynamic"), change)
    error = refused(model, tmp_path, "model.layers.{0..1}.mlp.up_proj.weight_offset", "is not zero")
    assert "symmetric" in error.hint


def test_inputs_that_are_shared_and_scaled_differently_are_refused_all_at_once(own: Int8, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[LAYER + "self_attn.k_proj.input_scale"].bits[0] += 1
        tensors[UP + ".input_offset"].bits[0] = np.float32(99).view(np.uint32)

    refused(
        edited(own("qwen3", "static"), change),
        tmp_path,
        f"{LAYER}self_attn.k_proj.input_scale: differs from {Q}.input_scale",
        f"{UP}.input_offset: differs from {LAYER}mlp.gate_proj.input_offset",
    )


def test_int64_scales_that_are_no_float32_bits_are_refused(own: Int8, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[OUT + ".deq_scale"].bits[2] = 1 << 40

    refused_while_moving(edited(own("qwen3", "of float16"), change), tmp_path, OUT + ".deq_scale")


def refused_while_moving(model: Path, tmp_path: Path, *words: str) -> None:
    with pytest.raises(MsconvError) as error:
        convert(model, tmp_path / "out")
    assert all(word in error.value.message for word in words), error.value.message
    assert not (tmp_path / "out" / "READY").exists()


def test_static_experts_are_refused(source: Int8, tmp_path: Path) -> None:
    model = modelslim(source("qwen3_moe", "BF16"), tmp_path / "model", all_static)
    refused(
        model,
        tmp_path,
        "model.layers.0.mlp.experts.{0..15}.up_proj.weight",
        "grouped products of experts have no such scale",
    )


def test_matrices_that_graphs_read_as_values_are_refused(source: Int8, tmp_path: Path) -> None:
    model = modelslim(source("deepseek_v3", "BF16"), tmp_path / "model", lambda name: "W8A8_DYNAMIC")
    refused(model, tmp_path, "model.layers.{0..1}.self_attn.kv_b_proj.weight", "graphs read it as values")


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("quant_bias", "F32", "float32 is not what int8 (W8A8, one scale an input) codes need (int32)"),
        ("quant_bias", "I64", "int64 is not what int8 (W8A8, one scale an input) codes need (int32)"),
        (
            "deq_scale",
            "F64",
            "float64 is not what int8 (W8A8, one scale an input) codes need (bfloat16 or float16 or",
        ),
        ("deq_scale", "I8", "int8 is not what"),
        ("input_scale", "I64", "int64 is not what"),
    ],
)
def test_what_stands_beside_codes_in_another_type_is_refused_with_the_type_it_needs(
    own: Int8, tmp_path: Path, name: str, code: str, said: str
) -> None:
    def change(tensors: Tensors) -> None:
        shape = tensors[f"{OUT}.{name}"].bits.shape
        tensors[f"{OUT}.{name}"] = Stored(code, np.zeros(shape, BITS.get(code, np.uint64)))

    error = refused(edited(own("qwen3", "static"), change), tmp_path, f"{OUT}.{name}: element type {said}")
    assert "--dtype" not in error.hint


def test_a_bias_of_a_norm_that_no_graph_takes_is_refused(own: Int8, tmp_path: Path) -> None:
    model = own("qwen3", "shifted")

    def change(tensors: Tensors) -> None:
        tensors["model.norm.bias"] = tensors[LAYER + "input_layernorm.bias"]

    described(model, lambda values: values.update({"model.norm.bias": "FLOAT"}))
    refused(edited(model, change), tmp_path, "model.norm.bias", "unknown to this model")


def test_a_description_beside_a_configuration_of_weights_is_refused(own: Int8, tmp_path: Path) -> None:
    model = own("qwen3", "dynamic")
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    refused(model, tmp_path, "quantization_config", DESCRIPTION, "not clear")


def scheme(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scheme(num_bits=4), "weights.num_bits = 4"),
        (scheme(strategy="group", group_size=128), "weights.group_size = 128"),
        (scheme(symmetric=False), "weights.symmetric = False"),
        (scheme(type="float"), "weights.type = 'float'"),
        (lambda c: c["config_groups"]["group_0"].update(input_activations=None), "int8 activations are needed"),
        (lambda c: c["config_groups"]["group_0"]["input_activations"].update(dynamic=False), "dynamic = False"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (lambda c: c.update(sparsity_config={"format": "sparse-bitmask"}), "sparsity_config"),
        (lambda c: c.update(format="pack-quantized"), "only int-quantized"),
        (lambda c: c.update(invented=1), "invented"),
    ],
)
def test_other_schemes_of_compressed_tensors_are_refused_by_their_key(
    own: Int8, tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    model = own("qwen3", "compressed")
    config = json.loads((model / "config.json").read_text())
    change(config["quantization_config"])
    (model / "config.json").write_text(json.dumps(config))
    refused(model, tmp_path, words)


def test_sparsity_that_only_counts_zeros_changes_nothing(own: Int8, tmp_path: Path) -> None:
    model = own("qwen3", "compressed")
    convert(model, tmp_path / "plain")
    quantization = json.loads((model / "config.json").read_text())["quantization_config"]
    dense = {"format": "dense", "global_sparsity": 0.14, "sparsity_structure": "unstructured"}
    edit_json(model / "config.json", quantization_config={**quantization, "sparsity_config": dense})
    convert(model, tmp_path / "counted")
    one, other = (read_rank(tmp_path / name, 0) for name in ("plain", "counted"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name].bits, other[name].bits) for name in one)


def test_the_command_line_says_it_without_a_traceback(own: Int8, tmp_path: Path) -> None:
    model = described(own("qwen3", "dynamic"), lambda values: values.update(kv_cache_type="C8"))
    for command in ("plan", "convert"):
        done = run_msconv(command, "--model", model, "--tp", 2, "--output", tmp_path / "out")
        assert (done.code, "Traceback" in done.stderr) == (1, False)
        assert "int8 cache of keys and values" in done.stderr
    assert not (tmp_path / "out").exists()


def test_biases_that_are_folded_into_static_matrices_are_read_once(source: Int8, tmp_path: Path) -> None:
    """quant_bias has a matrix's bias already: one that is stored besides would be added twice."""
    model = modelslim(source("qwen3", "BF16"), tmp_path / "model", static_attention, Form(biases=True))
    assert not [n for n in read_checkpoint(model) if n.endswith("proj.bias")]
    assert prepare(model, 2, output=tmp_path / "out").plan.quant == "w8a8-dynamic, w8a8-static"
