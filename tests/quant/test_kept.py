"""Matrices that stay codes in the artifact: every layout has the codes and scales of its values, cut alike.

The format is the one that docs/adding-a-weight-format.md adds.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv import quant
from msconv.steps.reshard import prepare as prepare_reshard
from msconv_runtime.artifact import read_manifest
from msconv_runtime.errors import CheckpointError, PlanError
from tests.checkpoints import Stored, edit_json, make_qwen3, read_checkpoint, read_rank, write_safetensors
from tests.conversions import convert, prepare
from tests.docs.following import text_of
from tests.docs.test_adding_a_weight_format import PAGE
from tests.moe_checkpoints import QUANTISED, make_deepseek_v3, make_qwen3_moe, widen

FILE = "converter/msconv/quant/int8_rows.py"
Model = Callable[[str], Path]

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen3": lambda path: make_qwen3(path, attention_bias=True),
    "qwen3_moe": make_qwen3_moe,
    "deepseek_v3": make_deepseek_v3,
}
LAYOUTS = [
    *(("qwen3", tp, 1) for tp in (1, 2, 4)),  # at 4, two ranks share each of the keys' heads
    *(("qwen3_moe", tp, ep) for tp, ep in ((1, 1), (2, 1), (2, 2), (4, 2))),
    *(("deepseek_v3", tp, ep) for tp, ep in ((1, 1), (4, 2))),
]


@pytest.fixture(scope="module", autouse=True)
def int8_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page's format, as if its file were there."""
    path = tmp_path_factory.mktemp("format") / "int8_rows.py"
    path.write_text(text_of(PAGE, FILE))
    name = "msconv.quant.int8_rows"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        patch.setattr(quant, "FORMATS", (*quant.FORMATS, module.Int8Rows))
        yield module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """`model("qwen3")`: a checkpoint of codes and scales; beside it, under `values`, the same as its values."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def make(family: str) -> Path:
        plain = FAMILIES[family](root / family / "random")
        kept, values = root / family / "codes", root / family / "values"
        save(plain, kept, quantise(read_checkpoint(plain)))
        save(plain, values, dequantise(read_checkpoint(kept)))
        edit_json(kept / "config.json", quantization_config={"quant_method": "int8-rows"})
        return kept

    return make


def save(like: Path, directory: Path, tensors: dict[str, Stored]) -> None:
    directory.mkdir()
    (directory / "config.json").write_bytes((like / "config.json").read_bytes())
    write_safetensors(directory / "model.safetensors", tensors)


def quantise(tensors: dict[str, Stored]) -> dict[str, Stored]:
    out = {}
    for name, tensor in tensors.items():
        out[name] = tensor
        if QUANTISED.search(name):
            values = widen(tensor)
            scales = np.abs(values).max(1, keepdims=True) / np.float32(127)
            out[name] = Stored("I8", np.rint(values / scales).astype(np.int8))
            out[name + "_scale"] = Stored("F32", scales.view(np.uint32))
    return out


def dequantise(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Code * scale where there is a scale.  Of experts, [E, in, out] and [E, 1, out]: just so."""
    out = {}
    for name, tensor in tensors.items():
        if name + "_scale" in tensors:
            values = tensor.bits.astype(np.float32) * tensors[name + "_scale"].bits.view(np.float32)
            out[name] = Stored("F32", values.view(np.uint32))
        elif not name.endswith("_scale"):
            out[name] = tensor
    return out


@pytest.mark.parametrize(("family", "tp", "ep"), LAYOUTS)
def test_codes_times_scales_are_the_values_of_each_rank(
    model: Model, tmp_path: Path, family: str, tp: int, ep: int
) -> None:
    convert(model(family), tmp_path / "codes", tp, ep=ep)
    convert(model(family).with_name("values"), tmp_path / "values", tp, ep=ep)
    for rank in range(tp):
        kept = read_rank(tmp_path / "codes", rank)
        found, wanted = dequantise(kept), read_rank(tmp_path / "values", rank)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert np.array_equal(found[name].bits, tensor.bits), (rank, name)
        codes = {name for name in kept if name + "_scale" in kept}
        assert codes == {name for name in wanted if "_proj" in name and "weight" in name}


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("qwen3", (1, 1), (4, 1)),
        ("qwen3", (4, 1), (2, 1)),
        ("qwen3_moe", (4, 2), (2, 2)),
        ("deepseek_v3", (2, 1), (4, 2)),
    ],
)
def test_cut_anew_it_is_the_direct_conversion(
    model: Model, tmp_path: Path, family: str, before: tuple[int, int], after: tuple[int, int]
) -> None:
    from msconv.steps.conversion import run

    convert(model(family), tmp_path / "before", before[0], ep=before[1])
    convert(model(family), tmp_path / "direct", after[0], ep=after[1])
    run(prepare_reshard(tmp_path / "before", after[0], after[1], output=tmp_path / "after"))
    weights = [read_manifest(tmp_path / name).weights for name in ("direct", "after")]
    assert weights[0] is not None and weights[1] is not None
    assert weights[0].digest == weights[1].digest
    assert [w.quant for w in weights if w] == ["int8-rows"] * 2


def test_the_parameters_are_those_of_the_model_without_scales(model: Model, tmp_path: Path) -> None:
    plans = [prepare(path, 2).plan for path in (model("qwen3"), model("qwen3").with_name("values"))]
    assert plans[0].parameters == plans[1].parameters
    assert plans[0].output_bytes < 0.6 * plans[1].output_bytes  # embeddings and head keep their four bytes
    assert (plans[0].source_dtype, plans[0].dtype) == ("float32", "float32")  # of what is values


def test_what_is_plain_is_cast_and_what_is_kept_is_not(model: Model, tmp_path: Path) -> None:
    convert(model("qwen3"), tmp_path / "out", dtype="bfloat16")
    weights = read_manifest(tmp_path / "out").weights
    assert weights is not None
    types = {t.name.removeprefix("model.layers.0."): t.dtype for t in weights.tensors}
    assert types["self_attn.o_proj.weight"] == "int8"
    assert types["self_attn.o_proj.weight_scale"] == "float32"
    assert types["input_layernorm.weight"] == types["model.embed_tokens.weight"] == "bfloat16"


GATE = "model.layers.1.mlp.gate_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def without(name: str) -> Callable[[dict[str, Stored]], object]:
    return lambda tensors: tensors.pop(name)


def float_gate(tensors: dict[str, Stored]) -> None:
    plain = dequantise({name: tensors[name] for name in (GATE, GATE + "_scale")})
    del tensors[GATE + "_scale"]
    tensors |= plain


def half_scale(tensors: dict[str, Stored]) -> None:
    tensors[GATE + "_scale"] = Stored("F32", tensors[GATE + "_scale"].bits[::2])


def whole_scale(tensors: dict[str, Stored]) -> None:
    tensors[GATE + "_scale"] = Stored("I32", tensors[GATE + "_scale"].bits)


def int8_norm(tensors: dict[str, Stored]) -> None:
    tensors["model.norm.weight"] = Stored("I8", np.ones(128, np.int8))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without(GATE + "_scale"), ("Missing from the checkpoint (1)", GATE + "_scale")),
        (without(GATE), ("Missing from the checkpoint (1)", "unknown to this model (1)", GATE + "_scale")),
        (float_gate, ("gate_up_proj.weight: is made of matrices in several", f"{GATE} is plain; {UP} is int8")),
        (half_scale, (GATE + "_scale: has shape [128, 1], int8 codes need [256, 1]",)),
        (whole_scale, (GATE + "_scale: element type int32 is not",)),
        (int8_norm, ("model.norm.weight: element type int8 is not a weight type",)),
    ],
    ids=["no scale", "no matrix", "fused with values", "half a scale", "whole numbers", "a norm"],
)
def test_what_does_not_fit_is_refused(
    model: Model, tmp_path: Path, edit: Callable[[dict[str, Stored]], object], words: tuple[str, ...]
) -> None:
    tensors = read_checkpoint(model("qwen3"))
    edit(tensors)
    save(model("qwen3"), tmp_path / "model", tensors)
    with pytest.raises(PlanError) as caught:
        prepare(tmp_path / "model", 2)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_codes_without_a_configuration_are_refused(model: Model, tmp_path: Path) -> None:
    save(model("qwen3"), tmp_path / "model", read_checkpoint(model("qwen3")))
    edit_json(tmp_path / "model" / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"INT8 with a scale a tensor or a row.*28 tensors"):
        prepare(tmp_path / "model", 1)
