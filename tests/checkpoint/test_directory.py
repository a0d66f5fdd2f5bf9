"""Checkpoint directories: complete and consistent, or refused with what is wrong and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msconv.checkpoint.directory import Checkpoint, open_checkpoint, open_configuration
from msconv.families import DecoderConfig, configure
from msconv_runtime.errors import CheckpointError, MsconvError, UsageError
from tests.checkpoints import edit_json, read_checkpoint, read_safetensors, write_safetensors
from tests.conftest import Checkpoints

INDEX = "model.safetensors.index.json"
OLD: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 1003,
}


def directory_instead(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (directory_instead, "a directory"),
        (os.mkfifo, "a pipe"),
        (lambda path: path.symlink_to(path.name), "a link that leads to no file"),
    ],
)
def test_weights_that_are_no_file_are_said_to_be_none(
    own_checkpoint: Checkpoints, make: Callable[[Path], None], words: str
) -> None:
    directory = own_checkpoint("untied")
    (directory / "model.safetensors").unlink()
    make(directory / "model.safetensors")
    error = refused(directory)
    assert f"model.safetensors: is no regular file: it is {words}" in error.message
    assert error.hint and INDEX not in error.hint


@pytest.mark.parametrize("make", [directory_instead, os.mkfifo])
def test_a_shard_that_is_no_file_is_said_to_be_none(shards: Path, make: Callable[[Path], None]) -> None:
    name = shard_names(shards)[0]
    (shards / name).unlink()
    make(shards / name)
    assert f"{name}: is no regular file" in refused(shards).message


@pytest.fixture
def shards(own_checkpoint: Checkpoints) -> Path:
    return own_checkpoint("bfloat16_shards")


def refused(directory: Path, kind: type[MsconvError] = CheckpointError) -> MsconvError:
    with pytest.raises(kind) as caught:
        open_checkpoint(directory)
    assert len(caught.value.message) < 2000
    return caught.value


def shard_names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("*.safetensors"))


def weight_map(directory: Path) -> dict[str, str]:
    return dict(json.loads((directory / INDEX).read_text())["weight_map"])


def reindex(directory: Path, changes: dict[str, str | None]) -> None:
    index = weight_map(directory)
    for name, file in changes.items():
        index.pop(name, None)
        if file is not None:
            index[name] = file
    edit_json(directory / INDEX, weight_map=index)


def config_of(**changes: Any) -> DecoderConfig:
    raw = {k: v for k, v in {**OLD, **changes}.items() if v is not ...}
    return configure(raw, "config.json")[1]


def complaint(**changes: Any) -> str:
    with pytest.raises(MsconvError) as caught:
        config_of(**changes)
    assert "config.json" in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("variant", ["untied", "tied", "bfloat16_shards", "attention_bias"])
def test_a_whole_checkpoint_has_every_tensor(checkpoint: Checkpoints, variant: str) -> None:
    directory = checkpoint(variant)
    found: Checkpoint = open_checkpoint(directory)
    expected = read_checkpoint(directory)
    assert {n: t.shape for n, t in found.tensors.items()} == {n: t.bits.shape for n, t in expected.items()}
    assert found.name == variant
    assert len(found.files) == len(shard_names(directory))


def test_a_missing_shard_is_named(shards: Path) -> None:
    lost = shard_names(shards)[3]
    (shards / lost).unlink()
    assert lost in refused(shards).message


def test_all_damage_is_listed_at_once(shards: Path) -> None:
    lost, cut, garbled = shard_names(shards)[:3]
    (shards / lost).unlink()
    data = (shards / cut).read_bytes()
    (shards / cut).write_bytes(data[:-100])
    (shards / garbled).write_bytes(b"<html>404</html>")
    error = refused(shards)
    assert all(name in error.message for name in (lost, cut, garbled))
    assert "100 are missing" in error.message
    assert "Download" in error.hint


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.safetensors\0",
        "x\0.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_an_index_cannot_lead_out_of_the_directory(shards: Path, file: Any) -> None:
    index = weight_map(shards)
    index["model.norm.weight"] = file
    (shards / INDEX).write_text(json.dumps({"weight_map": index}))
    error = refused(shards)
    assert "model.norm.weight" in error.message
    assert "not the name of a safetensors file in this directory" in error.message


@pytest.mark.parametrize("file", ["x" * 300 + ".safetensors", "\ud800.safetensors", ".safetensors"])
def test_an_index_with_a_name_no_file_can_have_is_refused(shards: Path, file: str) -> None:
    reindex(shards, {"model.norm.weight": file})
    refused(shards)


@pytest.mark.parametrize("name", ["model.{x}.weight", "9" * 5000, "1." * 3000, "\ud800", "\x1b[2J"])
def test_an_index_with_an_odd_tensor_name_is_refused(shards: Path, name: str) -> None:
    reindex(shards, {name: shard_names(shards)[0]})
    message = refused(shards).message
    assert "in no shard (1)" in message
    assert message.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", '{"weight_map": 1, "weight_map": 2}']
)
def test_an_index_that_is_none_is_refused(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    assert INDEX in refused(shards).message


def test_an_index_that_is_not_utf8_is_refused(shards: Path) -> None:
    (shards / INDEX).write_bytes(b'{"weight_map": {"\xff": "x.safetensors"}}')
    assert "UTF-8" in refused(shards).message


def test_an_index_that_disagrees_with_the_shards_is_refused_with_all_names(shards: Path) -> None:
    index = weight_map(shards)
    other = next(f for f in shard_names(shards) if f != index["model.norm.weight"])
    reindex(
        shards,
        {"model.norm.weight": other, "model.layers.0.mlp.up_proj.weight": None, "model.extra.weight": other},
    )
    message = refused(shards).message
    assert "In another shard" in message
    assert "model.norm.weight" in message
    assert "not named by" in message
    assert "model.layers.0.mlp.up_proj.weight" in message
    assert "in no shard" in message
    assert "model.extra.weight" in message


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    first, second = shard_names(shards)[:2]
    doubled = next(iter(read_safetensors(shards / first).items()))
    write_safetensors(shards / second, dict([doubled]) | read_safetensors(shards / second))
    message = refused(shards).message
    assert doubled[0] in message
    assert first in message
    assert second in message


def test_shards_without_an_index_are_refused(shards: Path) -> None:
    (shards / INDEX).unlink()
    error = refused(shards)
    assert INDEX in error.message
    assert INDEX in error.hint


def test_files_the_index_does_not_name_are_not_read(shards: Path) -> None:
    (shards / "consolidated.safetensors").write_bytes(b"not for us")
    assert "consolidated.safetensors" not in open_checkpoint(shards).files


def test_only_pickles_are_refused_and_said_never_to_be_read(own_checkpoint: Checkpoints) -> None:
    directory = own_checkpoint("tied")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    error = refused(directory)
    assert ".bin" in error.message
    assert "never read" in error.message
    assert "safetensors" in error.hint


def test_no_config_is_no_model_directory(own_checkpoint: Checkpoints) -> None:
    directory = own_checkpoint("tied")
    (directory / "config.json").unlink()
    error = refused(directory, UsageError)
    assert "config.json" in error.message
    assert "config.json" in error.hint


def test_a_directory_that_is_not_there_or_is_a_file_is_refused(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nowhere", UsageError).message
    (tmp_path / "file").write_text("")
    assert "not a directory" in refused(tmp_path / "file", UsageError).message


def test_a_name_too_long_for_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MsconvError):
        open_configuration(tmp_path / ("x" * 300))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"a": Infinity}'])
def test_a_config_that_is_no_json_object_is_refused(own_checkpoint: Checkpoints, data: bytes) -> None:
    directory = own_checkpoint("tied")
    (directory / "config.json").write_bytes(data)
    assert "config.json" in refused(directory).message


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": [], "model_type": "llama"},
        {"architectures": None, "model_type": None},
        {"architectures": "Qwen3ForCausalLM", "model_type": "llama"},
        {"architectures": [7, None], "model_type": ["qwen3"]},
        {"architectures": ["x" * 100_000]},
    ],
)
def test_an_unsupported_family_is_told_the_supported_ones(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        config_of(**changes)
    assert "Qwen3ForCausalLM" in caught.value.hint
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_sliding_window": True}, ["sliding"]),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, ["layer_types"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"hidden_act": None}, ["hidden_act"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "yarn", "linear"]),
        ({"rope_scaling": {"type": "longrope"}}, ["longrope"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling"]),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, ["rope_type"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, ["factor"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["weight_block_size = None"]),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            ["quantization_config: quant_method", "gptq"],
        ),
        ({"quantization_config": {"fmt": "e5m2", "weight_block_size": [128, 0]}}, ["e5m2", "[128, 0]"]),
        ({"quantization_config": "fp8"}, ["quantization_config", "an object"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 8", "num_key_value_heads 3"]),
        ({"head_dim": 31}, ["head_dim 31"]),
        ({"vocab_size": ...}, ["vocab_size"]),
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"hidden_size": -128}, ["hidden_size", "-128"]),
        ({"hidden_size": "128"}, ["hidden_size"]),
        ({"hidden_size": 128.0}, ["hidden_size"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 2**70}, ["num_hidden_layers"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps"]),
        ({"rms_norm_eps": 1e300}, ["rms_norm_eps = 1e+300", "float32", "from 1.4e-45 to 3.4e+38"]),
        ({"rms_norm_eps": 1e-60}, ["rms_norm_eps = 1e-60", "float32", "from 1.4e-45 to 3.4e+38"]),
        ({"rope_theta": 10**400}, ["rope_theta", "float32"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 3.5e38}}, ["factor = 3.5e+38", "float32"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e39}}, ["beta_fast", "float32"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings"]),
        ({"attention_bias": 1}, ["attention_bias"]),
    ],
)
def test_what_a_graph_could_not_obey_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    message = complaint(**changes)
    assert all(word in message for word in words)


def test_everything_a_graph_could_not_obey_is_said_at_once() -> None:
    message = complaint(hidden_act="gelu", use_sliding_window=True, head_dim=31, rope_scaling={"type": "su"})
    assert all(word in message for word in ("hidden_act", "sliding", "head_dim", "'su'"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_scaling": None}, {"rope_type": "default"}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.5}},
            {"rope_type": "linear", "factor": 2.5},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 16, "attention_factor": 1.5}},
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "attention_factor": 1.5},
        ),
    ],
    ids=["default", "linear", "yarn", "yarn with its numbers"],
)
def test_both_spellings_of_a_config_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    published = config_of(**old)
    rewritten = config_of(
        rope_scaling=...,
        rope_theta=...,
        torch_dtype=...,
        dtype="bfloat16",
        rope_parameters={"rope_theta": 1000000.0, **new},
        layer_types=["full_attention"] * 4,
        sliding_window=None,
    )
    assert published == rewritten
    assert published.rope.theta == 1e6
    assert published.dtype == "bfloat16"


def test_what_transformers_writes_is_what_it_was_given(checkpoint: Checkpoints) -> None:
    yarn = open_configuration(checkpoint("yarn")).config.rope
    assert (yarn.kind, yarn.factor, yarn.original_max_positions, yarn.attention_factor) == ("yarn", 4.0, 64, 1.2)
    linear = open_configuration(checkpoint("linear_rope")).config.rope
    assert (linear.kind, linear.factor, linear.theta) == ("linear", 2.5, 10000.0)
    assert open_configuration(checkpoint("tied")).config.tied
    assert open_configuration(checkpoint("attention_bias")).config.attention_bias


def test_a_model_without_kv_heads_of_its_own_has_as_many_as_heads() -> None:
    assert config_of(num_key_value_heads=...).kv_heads == 8
