"""int8 in: codes, scales and biases are cut as the values that they stand for.  int8 made: codes and scales are
those of an independent quantisation, in every layout, and whatever the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv.steps.reshard import prepare as prepare_reshard
from msconv_runtime.artifact import Artifact, read_manifest
from msconv_runtime.artifact.integrity import check_artifact
from msconv_runtime.errors import CheckpointError
from tests.checkpoints import Stored, read_checkpoint, read_rank, read_tree, write_safetensors
from tests.conversions import convert, prepare, run
from tests.int8_checkpoints import (
    DESCRIPTION,
    Form,
    Tensors,
    all_dynamic,
    as_values,
    modelslim,
    numbers,
    quantised,
    values_of,
    write_shards,
)
from tests.moe_checkpoints import widen
from tests.quant.conftest import FAMILIES, FORMS, Int8
from tests.stream.moe_models import BLOCK, change

pytestmark = pytest.mark.usefixtures("quick")

MESHES = ((1, 1), (2, 1), (4, 2), (4, 4), (8, 4))
DENSE = ((1, 1), (2, 1), (4, 1), (8, 1))
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")


def meshes(family: str) -> tuple[tuple[int, int], ...]:
    return DENSE if family == "qwen3" else MESHES


def forms(family: str) -> list[str]:
    return [f for f in FORMS if family == "qwen3" or f != "static"]  # experts have no static form


CASES = [(family, form) for family in FAMILIES for form in forms(family)]


def weights(artifact: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((artifact / "weights").iterdir())}


# int8 in


@pytest.mark.parametrize(("family", "form"), CASES)
def test_codes_and_scales_of_each_rank_are_its_values(int8: Int8, tmp_path: Path, family: str, form: str) -> None:
    directory = int8(family, form)
    plain = tmp_path / "values"
    plain.mkdir()
    shutil.copy(directory / "config.json", plain)
    config = json.loads((plain / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "config.json").write_text(json.dumps(config))
    write_safetensors(plain / "model.safetensors", values_of(read_checkpoint(directory)))
    for tp, ep in meshes(family):
        convert(directory, tmp_path / f"{tp}-{ep}", tp, ep=ep)
        convert(plain, tmp_path / f"plain-{tp}-{ep}", tp, ep=ep, dtype="float32")
        for rank in range(tp):
            kept = read_rank(tmp_path / f"{tp}-{ep}", rank)
            found, wanted = values_of(kept), read_rank(tmp_path / f"plain-{tp}-{ep}", rank)
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert np.array_equal(found[name].bits, tensor.bits), (tp, ep, rank, name)
            assert any(t.code == "I8" for t in kept.values())
            check_shapes(kept)
        assert check_artifact(Artifact(tmp_path / f"{tp}-{ep}")) == []


def check_shapes(kept: Tensors) -> None:
    """What stands beside codes is float32 and has a row's or an input's shape."""
    for name, tensor in kept.items():
        if tensor.code != "I8":
            continue
        module = name.removesuffix(".weight")
        if name + "_scale" in kept:
            rows = tensor.bits.shape[-1] if tensor.bits.ndim == 3 else tensor.bits.shape[0]
            wanted = (len(tensor.bits), 1, rows) if tensor.bits.ndim == 3 else (rows, 1)
            scale = kept[name + "_scale"]
            assert (scale.code, scale.bits.shape) == ("F32", wanted), name
            assert module + ".deq_scale" not in kept
        else:
            codes = {end: (t.code, t.bits.shape) for end in STATIC if (t := kept[f"{module}.{end}"])}
            rows = len(tensor.bits)
            assert codes == {
                "deq_scale": ("F32", (rows,)),
                "quant_bias": ("I32", (rows,)),
                "input_scale": ("F32", (1,)),
                "input_offset": ("F32", (1,)),
            }


STATIC = ("deq_scale", "quant_bias", "input_scale", "input_offset")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["mixed", "static with biases"])
def test_every_ranks_quant_bias_is_of_its_own_columns(int8: Int8, tmp_path: Path, family: str, form: str) -> None:
    """What the offset adds to a rank's sums is taken out by that rank; biases come once over all ranks."""
    directory = int8(family, form)
    source = read_checkpoint(directory)
    biases = {}  # by deq_scale, which tells rows apart
    for name in (n for n in source if n.endswith(".quant_bias")):
        module = name.removesuffix(".quant_bias")
        offset = int(numbers(source[module + ".input_offset"])[0])
        bias = source[name].bits.view(np.int32) + offset * source[module + ".weight"].bits.sum(1, dtype=np.int64)
        assert bias.any() == (form != "mixed")
        for scale, value in zip(numbers(source[module + ".deq_scale"]), bias, strict=True):
            biases.setdefault((module.rpartition(".")[0], float(scale)), set()).add(int(value))
    for tp, ep in meshes(family):
        convert(directory, tmp_path / f"{tp}-{ep}", tp, ep=ep)
        ranks = [read_rank(tmp_path / f"{tp}-{ep}", rank) for rank in range(tp)]
        names = [n for n in ranks[0] if n.endswith(".quant_bias")]
        assert names
        for name in names:
            module = name.removesuffix(".quant_bias")
            left = []
            for rank in ranks:
                offset = int(numbers(rank[module + ".input_offset"])[0])
                codes = rank[module + ".weight"].bits
                left.append(rank[name].bits.view(np.int32) + offset * codes.sum(1, dtype=np.int64))
            scales = [numbers(rank[module + ".deq_scale"]) for rank in ranks]
            if (module + ".weight").endswith(ROW_PARALLEL):
                assert not any(part.any() for part in left[1:])
                left, scales = left[:1], scales[:1]
            for part, scale in zip(left, scales, strict=True):
                for row, value in enumerate(part):
                    assert int(value) in biases[module.rpartition(".")[0], float(scale[row])], (name, row)


def test_mixed_types_become_dynamic_and_what_is_left_out_is_said(int8: Int8, tmp_path: Path) -> None:
    convert(int8("qwen3", "mix"), tmp_path / "out")
    kept = read_rank(tmp_path / "out", 0)
    assert not [n for n in kept if n.endswith(STATIC)]
    weights = read_manifest(tmp_path / "out").weights
    assert weights is not None
    assert (weights.quant, weights.made) == ("w8a8-dynamic", "")
    assert any("W8A8_MIX" in d.reason for d in weights.dropped)
    assert any(d.name.endswith("weight_offset") for d in weights.dropped)


def test_codes_of_minus_128_and_biases_of_norms_arrive(int8: Int8, tmp_path: Path) -> None:
    convert(int8("deepseek_v3", "shifted"), tmp_path / "out", 2, ep=2)
    kept, source = read_rank(tmp_path / "out", 1), read_checkpoint(int8("deepseek_v3", "shifted"))
    for name in (n for n in source if n.endswith("layernorm.bias")):
        assert np.array_equal(kept[name].bits, source[name].bits)
    assert sum(n.endswith("layernorm.bias") for n in kept) == 4 * 2
    assert any((t.bits == -128).any() for t in kept.values() if t.code == "I8")


def test_published_tools_samples_have_the_same_form(int8: Int8) -> None:
    """The makers of these tests write what the tools' own files have: names, types and shapes."""
    tensors = read_checkpoint(int8("qwen3_moe", "mixed"))
    described = json.loads((int8("qwen3_moe", "mixed") / DESCRIPTION).read_text())
    assert set(tensors) == {n for n in described if "." in n}
    q = "model.layers.0.self_attn.q_proj."
    forms_of_q = {n.removeprefix(q): t.code for n, t in tensors.items() if n.startswith(q)}
    assert forms_of_q == {
        "weight": "I8",
        "deq_scale": "F32",
        "quant_bias": "I32",
        "input_scale": "F32",
        "input_offset": "F32",
    }


# int8 made


@pytest.mark.parametrize("code", ["BF16", "F32", "F16", "FP8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_quantised_is_an_independent_quantisation_in_every_layout(
    source: Int8, tmp_path: Path, family: str, code: str
) -> None:
    values = source(family, code)
    plain = as_values(values, tmp_path / "values", BLOCK) if code == "FP8" else values
    independent = modelslim(plain, tmp_path / "independent", all_dynamic, Form(reaches=False))
    for tp, ep in meshes(family):
        made, given = tmp_path / f"made-{tp}-{ep}", tmp_path / f"given-{tp}-{ep}"
        convert(values, made, tp, ep=ep, quant="w8a8")
        convert(independent, given, tp, ep=ep)
        assert weights(made) == weights(given), (tp, ep)
    found = read_manifest(made).weights
    assert found is not None
    assert (found.quant, found.made) == ("w8a8-dynamic", "w8a8")
    assert found.dtype == {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "FP8": "bfloat16"}[code]


def test_codes_and_scales_are_those_of_the_rule(source: Int8, tmp_path: Path) -> None:
    """Of matrices that are not joined with others, straight from the file."""
    convert(source("qwen3", "BF16"), tmp_path / "out", quant="w8a8")
    kept, values = read_rank(tmp_path / "out", 0), read_checkpoint(source("qwen3", "BF16"))
    for layer in (0, 1):
        for end in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            name = f"model.layers.{layer}.{end}"
            codes, scales = quantised(widen(values[name]))
            assert np.array_equal(kept[name].bits, codes)
            assert np.array_equal(kept[name + "_scale"].bits.view(np.float32), scales)
            assert not (kept[name + "_scale"].bits & 0xFFFF).any()  # bfloat16 values
    assert kept["lm_head.weight"].code == "BF16"


def test_rows_of_zeros_and_of_the_smallest_values_have_codes(source: Int8, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    model = Path(shutil.copytree(source("qwen3", "F32"), tmp_path / "model"))

    def edit(tensors: Tensors) -> None:
        bits = tensors[name].bits.copy()
        values = bits.view(np.float32)
        values[0] = 0
        values[1] = -0.0
        values[2] = np.float32(1e-45)
        values[3] = np.float32(3e38)
        values[4, ::2] = -values[4, 0]
        tensors[name] = Stored("F32", bits)

    change(model, edit)
    convert(model, tmp_path / "out", quant="w8a8")
    kept = read_rank(tmp_path / "out", 0)
    codes, scales = quantised(widen(read_checkpoint(model)[name]))
    assert np.array_equal(kept[name].bits, codes)
    assert np.array_equal(kept[name + "_scale"].bits.view(np.float32), scales)
    assert not codes[:2].any()
    assert (codes[3] == 127).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_values_that_are_no_numbers_have_no_codes(source: Int8, tmp_path: Path, value: float, name: str) -> None:
    model = Path(shutil.copytree(source("qwen3", "F32"), tmp_path / "model"))

    def edit(tensors: Tensors) -> None:
        bits = tensors[name].bits.copy()
        bits.view(np.float32)[7, 3] = value
        tensors[name] = Stored("F32", bits)

    change(model, edit)
    with pytest.raises(CheckpointError, match=r"no finite numbers \(row 7\b") as error:
        convert(model, tmp_path / "out", quant="w8a8")
    assert name in error.value.message
    assert not (tmp_path / "out" / "READY").exists()


# Resharding


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3", "static with biases"),
        ("qwen3", "static"),
        ("qwen3_moe", "mixed"),
        ("qwen3_moe", "dynamic"),
        ("deepseek_v3", "static with biases"),
        ("deepseek_v3", "dynamic"),
        ("deepseek_v3", "of float16"),
        ("deepseek_v3", "shifted"),
        ("qwen3", "--quant"),
        ("qwen3_moe", "--quant"),
        ("deepseek_v3", "--quant"),
    ],
)
def test_resharding_between_any_layouts_is_converting_directly(
    int8: Int8, source: Int8, tmp_path: Path, family: str, form: str
) -> None:
    for tp, ep in meshes(family):
        out = tmp_path / f"{tp}-{ep}"
        if form == "--quant":
            convert(source(family, "BF16"), out, tp, ep=ep, quant="w8a8")
        else:
            convert(int8(family, form), out, tp, ep=ep)
    for old in meshes(family):
        for new in meshes(family):
            if old != new:
                out = tmp_path / f"{old}-to-{new}"
                run(prepare_reshard(tmp_path / f"{old[0]}-{old[1]}", *new, output=out))
                assert weights(out) == weights(tmp_path / f"{new[0]}-{new[1]}"), (old, new)
                assert without_sources(out) == without_sources(tmp_path / f"{new[0]}-{new[1]}")
                shutil.rmtree(out)


def without_sources(artifact: Path) -> Any:
    manifest = json.loads((artifact / "msconv.json").read_text())
    manifest["model"].pop("files", None)
    return manifest


# What an artifact holds besides


@pytest.mark.parametrize("form", ["mixed", "compressed"])
def test_an_artifact_has_nothing_that_makes_a_server_take_another_loader(
    int8: Int8, tmp_path: Path, form: str
) -> None:
    model = Path(shutil.copytree(int8("qwen3_moe", form), tmp_path / "model"))
    (model / "hf_quant_config.json").write_text("{}")
    convert(model, tmp_path / "out", 2)
    found = {p.name for p in (tmp_path / "out").rglob("*")}
    assert not found & {DESCRIPTION, "hf_quant_config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    source = json.loads((model / "config.json").read_text())
    assert config == {k: v for k, v in source.items() if k != "quantization_config"}


@pytest.mark.parametrize("name", [DESCRIPTION, "hf_quant_config.json"])
def test_such_a_file_that_was_added_is_refused(int8: Int8, tmp_path: Path, name: str) -> None:
    from msconv_runtime.artifact.served import refuse_wrong_files
    from msconv_runtime.errors import ArtifactError

    convert(int8("qwen3", "mixed"), tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(ArtifactError, match=f"{name}: file: is not in the manifest"):
        refuse_wrong_files(Artifact(tmp_path / "out"))
    assert [d.path for d in check_artifact(Artifact(tmp_path / "out"))] == [name]


def test_zeros_below_zero_are_zeros(int8: Int8, tmp_path: Path) -> None:
    """-0.0 as an offset of symmetric codes changes nothing."""
    model = Path(shutil.copytree(int8("qwen3", "dynamic"), tmp_path / "model"))
    tensors = read_checkpoint(model)
    for path in model.glob("*.safetensors"):
        path.unlink()
    name = "model.layers.0.mlp.down_proj.weight_offset"
    tensors[name] = Stored("F32", np.full_like(tensors[name].bits, 0x80000000))
    write_shards(model, tensors)
    convert(model, tmp_path / "out")
    convert(int8("qwen3", "dynamic"), tmp_path / "usual")
    assert weights(tmp_path / "out") == weights(tmp_path / "usual")


def test_a_description_that_changed_starts_over(int8: Int8, tmp_path: Path) -> None:
    """A half-done conversion does not go on with other types."""
    model = Path(shutil.copytree(int8("qwen3", "mix"), tmp_path / "model"))
    before = prepare(model, 2, output=tmp_path / "out").identity
    described = json.loads((model / DESCRIPTION).read_text())
    changed = {n: "W8A8_DYNAMIC" if t == "W8A8_MIX" else t for n, t in described.items()}
    (model / DESCRIPTION).write_text(json.dumps(changed))
    after = prepare(model, 2, output=tmp_path / "out").identity
    assert before != after
    assert prepare(model, 2, output=tmp_path / "out").identity == after


def test_the_same_input_gives_the_same_artifact(source: Int8, tmp_path: Path) -> None:
    for jobs in (1, 3):
        convert(source("deepseek_v3", "FP8"), tmp_path / str(jobs), 4, ep=2, quant="w8a8", jobs=jobs)
    assert read_tree(tmp_path / "1") == read_tree(tmp_path / "3")
