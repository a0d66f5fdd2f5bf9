"""Checkpoints that are whole and not supported: told so, by kind, and never to be downloaded again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv.checkpoint.directory import open_checkpoint, open_configuration
from msconv.layout.cuts import Mesh
from msconv.layout.planning import make_plan
from msconv_runtime.artifact import MANIFEST
from msconv_runtime.errors import CheckpointError, MsconvError
from tests.checkpoints import Stored, edit_json, read_safetensors, write_safetensors
from tests.commands import run_msconv
from tests.synthetic import qwen3_config, write_synthetic

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = write_synthetic(tmp_path / "model", qwen3_config())
    (directory / "tokenizer.json").write_text("{}")
    return directory


def refusal(directory: Path) -> MsconvError:
    with pytest.raises(MsconvError) as caught:
        found = open_checkpoint(directory)
        make_plan(found.family.table, found.config.sizes(), found.tensors, Mesh(1))
    said = f"{caught.value.message} {caught.value.hint}"
    assert "ownload the checkpoint again" not in said
    assert "ownload this file again" not in said
    assert "ownload the files again" not in said
    return caught.value


def rewrite(directory: Path, change: Callable[[dict[str, Stored]], dict[str, Stored]]) -> None:
    path = directory / SINGLE
    write_safetensors(path, change(read_safetensors(path)))


def extra(**names: Stored) -> Callable[[dict[str, Stored]], dict[str, Stored]]:
    return lambda tensors: tensors | names


SMALL = Stored("F32", np.zeros((2, 2), np.uint32))
INTS = Stored("I32", np.zeros((2, 2), np.int32))
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ({f"{Q}.qweight": INTS, f"{Q}.qzeros": INTS, f"{Q}.scales": SMALL}, "GPTQ or AWQ"),
        ({f"{Q}.weight_packed": INTS, f"{Q}.weight_scale": SMALL}, "compressed-tensors"),
        ({f"{Q}.scales": SMALL, f"{Q}.biases": SMALL}, "MLX"),
        ({f"{Q}.weight.absmax": SMALL, f"{Q}.weight.quant_state.bitsandbytes__nf4": INTS}, "bitsandbytes"),
        ({f"{Q}.weight_scale": SMALL}, "FP8 or INT8"),
        ({f"{Q}.input_scale": SMALL}, "static scales"),
        ({f"base_model.model.{Q}.lora_A.weight": SMALL}, "LoRA"),
        ({"v_head.summary.weight": SMALL}, "head for values"),
        ({"score.weight": SMALL}, "head for values"),
        ({"vision_tower.blocks.0.weight": SMALL}, "images"),
    ],
)
def test_names_that_show_a_kind_are_told_so(model: Path, names: dict[str, Stored], word: str) -> None:
    rewrite(model, extra(**names))
    error = refusal(model)
    assert word in error.message
    assert any(name in error.message for name in names)
    assert "whole" in error.hint


@pytest.mark.parametrize(
    ("quant", "word"),
    [
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"group_size": 64, "bits": 4}, "MLX"),
        ({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}, "one scale a tensor"),
        ({"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "static"}, "activation_scheme"),
        ({"quant_method": "fp8", "weight_block_size": [8, 8], "mx_block": 32}, "quantization_config.mx_block"),
    ],
)
def test_a_quantisation_is_told_by_name(model: Path, quant: dict[str, Any], word: str) -> None:
    edit_json(model / "config.json", quantization_config=quant)
    assert word in refusal(model).message


def test_the_quantisation_of_mlx_is_refused(model: Path) -> None:
    edit_json(model / "config.json", quantization={"group_size": 64, "bits": 4})
    assert "quantization = " in refusal(model).message


@pytest.mark.parametrize("code", ["F8_E8M0", "F4", "F8_E4M3FNUZ"])
def test_an_element_type_that_is_not_read_is_told_apart_from_damage(model: Path, code: str) -> None:
    path = model / SINGLE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight_scale_inv"] = {"dtype": code, "shape": [4], "data_offsets": [0, 4]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    error = refusal(model)
    assert code in error.message
    assert "not supported" in error.message


def test_a_type_that_nobody_knows_is_damage(model: Path) -> None:
    path = model / SINGLE
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"BF61"'))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert "Download" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model-Q4_K_M.gguf", ("GGUF", "llama.cpp")),
        ("pytorch_model.bin", (".bin", "never read")),
        ("model.pth", (".pth", "never read")),
        ("tf_model.h5", (".h5", "never read")),
        ("weights.npz", ("MLX",)),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_other_files_than_safetensors_are_told_by_kind(
    model: Path, file: str, words: tuple[str, ...], config: bool
) -> None:
    (model / SINGLE).rename(model / file)
    if not config:
        (model / "config.json").unlink()
    error = refusal(model)
    assert all(word in f"{error.message} {error.hint}" for word in words)


def test_a_file_of_gguf_is_told_so(model: Path) -> None:
    path = (model / SINGLE).rename(model / "model.gguf")
    assert "GGUF" in refusal(path).message


@pytest.mark.parametrize("config", [True, False])
def test_a_directory_of_an_adapter_is_told_to_be_merged(model: Path, config: bool) -> None:
    (model / SINGLE).rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text("{}")
    if not config:
        (model / "config.json").unlink()
    error = refusal(model)
    assert "LoRA" in error.message
    assert "merge" in error.hint


def test_an_embedding_model_is_told_so(model: Path) -> None:
    (model / "1_Pooling").mkdir()
    assert "embedding" in refusal(model).message


def test_a_body_without_a_head_is_told_so(model: Path) -> None:
    rewrite(
        model,
        lambda t: {n.removeprefix("model."): v for n, v in t.items() if n != "lm_head.weight"},
    )
    assert "embedding" in refusal(model).message


def test_names_of_another_model_are_not_called_damage(model: Path) -> None:
    rewrite(model, lambda t: {n.replace("q_norm", "query_norm"): v for n, v in t.items()})
    error = refusal(model)
    assert "Missing from the checkpoint" in error.message
    assert "whole" in error.hint


# Doubt about which weights are the model's


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_synthetic(tmp_path / "shards", qwen3_config(), shards=3)


def test_one_file_beside_indexed_shards_is_refused(shards: Path, model: Path) -> None:
    shutil.copy(model / SINGLE, shards)
    message = refusal(shards).message
    assert SINGLE in message
    assert INDEX in message


def test_a_stale_index_is_called_stale(shards: Path, model: Path) -> None:
    for path in shards.glob("model-*.safetensors"):
        path.unlink()
    shutil.copy(model / SINGLE, shards)
    assert "stale" in refusal(shards).message


def test_one_file_beside_shards_without_an_index_is_refused(shards: Path, model: Path) -> None:
    (shards / INDEX).unlink()
    shutil.copy(model / SINGLE, shards)
    assert "not clear" in refusal(shards).message


def test_files_that_are_not_read_are_said(shards: Path, model: Path) -> None:
    shutil.copy(model / SINGLE, shards / "consolidated.safetensors")
    assert any("consolidated.safetensors" in note for note in open_checkpoint(shards).notes)


# What is told at conversion


@pytest.mark.parametrize(
    ("files", "word"),
    [
        (
            ["tiktoken.model", "tokenization_kimi.py", "tokenizer_config.json"],
            "tiktoken.model, tokenization_kimi.py",
        ),
        (["tokenizer_config.json"], "No tokenizer"),
        (["vocab.json", "merges.txt"], ""),
        (["tokenizer.json", "tiktoken.model"], ""),
        (["tokenizer.model"], ""),
    ],
)
def test_a_tokenizer_that_needs_code_is_told(tmp_path: Path, files: list[str], word: str) -> None:
    directory = write_synthetic(tmp_path / "m", qwen3_config())
    for name in files:
        (directory / name).write_text("")
    notes = " ".join(open_checkpoint(directory).notes)
    assert (word in notes) if word else ("okenizer" not in notes)


def test_what_is_noted_is_said_by_convert_and_plan(tmp_path: Path) -> None:
    directory = write_synthetic(tmp_path / "m", qwen3_config())
    (directory / "tiktoken.model").write_text("")
    for command in (["plan"], ["convert", "--dry-run", "--output", str(tmp_path / "out")]):
        result = run_msconv(command[0], "--model", str(directory), "--tp", "1", *command[1:])
        assert result.code == 0
        assert "tiktoken.model" in result.stderr


def test_a_key_said_to_be_harmless_is_kept_in_mind(tmp_path: Path) -> None:
    directory = write_synthetic(tmp_path / "m", qwen3_config(flux_gate=2))
    arguments = ("--model", str(directory), "--tp", "1", "--output", str(tmp_path / "out"))
    refused = run_msconv("convert", *arguments)
    assert refused.code == 1
    assert "flux_gate" in refused.stderr
    assert "--harmless flux_gate" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert run_msconv("convert", *arguments, "--harmless", "flux_gate").code == 0
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["model"]["harmless"] == ["flux_gate"]
    assert run_msconv("report", str(tmp_path / "out")).code == 0


# Names of models


@pytest.mark.parametrize(
    ("cached", "name"),
    [("models--Qwen--Qwen3-8B", "Qwen3-8B"), ("models--gpt2", "gpt2"), ("models--a--b--c", "b--c")],
)
def test_a_snapshot_in_the_cache_is_named_by_its_model(tmp_path: Path, cached: str, name: str) -> None:
    snapshot = tmp_path / cached / "snapshots" / ("0a" * 20)
    snapshot.parent.mkdir(parents=True)
    write_synthetic(snapshot, qwen3_config())
    assert open_configuration(snapshot).name == name
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert open_configuration(link).name == name
    assert open_checkpoint(link).name == name
    with pytest.raises(MsconvError) as caught:
        open_configuration(tmp_path / cached)
    assert str(snapshot) in caught.value.hint
