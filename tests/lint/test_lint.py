"""What is planted in a checkpoint is found, with its place; what is sound has no errors."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msconv.lint.findings import Finding
from msconv.steps.lint import Linted, lint
from msconv_runtime.errors import CheckpointError
from tests.checkpoints import Stored, edit_json, read_checkpoint, write_safetensors
from tests.commands import run_msconv
from tests.conversions import convert
from tests.int8_checkpoints import (
    DESCRIPTION,
    Form,
    Tensors,
    all_dynamic,
    all_mix,
    compressed_tensors,
    modelslim,
    static_attention,
    write_shards,
)
from tests.moe_checkpoints import add_mtp, quantise_fp8
from tests.stream.moe_models import BLOCK, DEEPSEEK, QWEN, random_checkpoint
from tests.synthetic import qwen3_config, write_synthetic

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of numpy: they would be on people's screens

Made = Callable[[str], Path]
LAYER = "model.layers.0."
Q, UP = LAYER + "self_attn.q_proj", LAYER + "mlp.experts.3.up_proj"

KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "plain": lambda source, out: Path(shutil.copytree(source, out)),
    "dynamic": lambda source, out: modelslim(source, out, all_dynamic),
    "mixed": lambda source, out: modelslim(source, out, static_attention),
    "mix": lambda source, out: modelslim(source, out, all_mix),
    "static of float16": lambda source, out: modelslim(source, out, static_attention, Form(bits64=True)),
    "shifted": lambda source, out: modelslim(source, out, static_attention, Form(biases=True, shifted=True)),
    "compressed": compressed_tensors,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made("mixed")`: a checkpoint with experts, made once.  To be read, never changed."""
    root = tmp_path_factory.mktemp("lint")
    random_checkpoint(root / "source", QWEN)

    def make(kind: str) -> Path:
        out = root / kind
        return out if out.exists() else KINDS[kind](root / "source", out)

    return make


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    return lambda kind: Path(shutil.copytree(made(kind), tmp_path / "own"))


def edit(directory: Path, change: Callable[[Tensors], object]) -> Path:
    """Change tensors, keeping the files' names."""
    tensors = read_checkpoint(directory)
    tensors = {n: Stored(t.code, t.bits.copy()) for n, t in tensors.items()}
    change(tensors)
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        path.unlink()
    if len(files) > 1:
        write_shards(directory, tensors)
    else:
        write_safetensors(files[0], tensors)
    return directory


def floats(tensor: Stored) -> Any:
    return tensor.bits.view(np.float32)


def found(done: Linted, severity: str = "error") -> list[Finding]:
    return [f for f in done.findings if f.severity == severity]


def only(done: Linted, severity: str, check: str, *words: str) -> None:
    """There is one finding so severe (or more so), and this is it."""
    worse = [f for f in done.findings if f.severity in ("error", severity)]
    assert [(f.severity, f.check) for f in worse] == [(severity, check)], worse
    for word in words:
        assert word in f"{worse[0].where}: {worse[0].problem}", worse[0]


@pytest.mark.parametrize("kind", KINDS)
def test_sound_checkpoints_have_nothing_worse_than_notes(made: Made, kind: str) -> None:
    done = lint(made(kind), jobs=2)
    assert done.is_sound
    assert not found(done, "warning")
    assert done.bytes_read == sum(p.stat().st_size for p in made(kind).glob("*.safetensors"))
    assert done.family == "qwen3_moe"


def test_fp8_with_multi_token_prediction_is_sound(tmp_path: Path) -> None:
    plain = random_checkpoint(tmp_path / "plain", DEEPSEEK)
    done = lint(add_mtp(quantise_fp8(plain, tmp_path / "fp8", BLOCK, shards=3)))
    assert not [f for f in done.findings if f.severity != "note"], done.findings


def set_scale(value: float, row: int = 2) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        floats(tensors[UP + ".weight_scale"])[row, 0] = value

    return change


@pytest.mark.parametrize(
    ("value", "severity", "words"),
    [
        (0.0, "error", "zero"),
        (-0.01, "error", "negative"),
        (np.nan, "error", "NaN"),
        (np.inf, "error", "infinite"),
        (3e4, "warning", "row 2 of"),
        (3e38, "warning", "row 2 of"),
    ],
)
def test_a_scale_that_cannot_be_is_found(own: Made, value: float, severity: str, words: str) -> None:
    done = lint(edit(own("dynamic"), set_scale(value)))
    only(done, severity, "scales", UP + ".weight_scale", words)


def test_int64_that_was_taken_for_numbers_is_found(own: Made) -> None:
    def change(tensors: Tensors) -> None:
        scale = tensors[Q + ".deq_scale"]
        tensors[Q + ".deq_scale"] = Stored("F32", scale.bits.astype(np.float32).view(np.uint32))

    done = lint(edit(own("static of float16"), change))
    only(done, "error", "scales", Q + ".deq_scale", "absurd")


def test_codes_that_use_a_fraction_of_their_range_are_found(own: Made) -> None:
    def change(tensors: Tensors) -> None:
        tensors[UP + ".weight"].bits[5] //= 8

    only(lint(edit(own("dynamic"), change)), "warning", "codes", UP + ".weight", "1 of", "row 5")


def test_codes_of_minus_128_are_a_note(made: Made) -> None:
    notes = found(lint(made("dynamic")), "note")
    assert any("-128" in f.problem for f in notes)
    assert lint(made("compressed")).findings == []


def test_a_weights_offset_is_found(own: Made) -> None:
    def change(tensors: Tensors) -> None:
        floats(tensors[UP + ".weight_offset"])[:2] = 3

    only(lint(edit(own("dynamic"), change)), "error", "scales", UP + ".weight_offset", "2 of", "entry 0 is 3.0")


@pytest.mark.parametrize("offset", [0.5, 128.0, 200.0, np.nan, np.inf])
def test_an_inputs_offset_that_is_no_code_is_found(own: Made, offset: float) -> None:
    def change(tensors: Tensors) -> None:
        floats(tensors[LAYER + "self_attn.o_proj.input_offset"])[0] = offset

    errors = found(lint(edit(own("mixed"), change)))
    assert ["o_proj.input_offset" in f.where for f in errors] == [True], errors


def test_a_quant_bias_of_another_row_is_found(own: Made) -> None:
    def change(tensors: Tensors) -> None:
        bias = tensors[Q + ".quant_bias"].bits
        bias[[0, 1]] = bias[[1, 0]]

    only(lint(edit(own("mixed"), change)), "warning", "scales", Q + ".quant_bias", "row 0")


def test_nan_and_infinite_values_are_found_and_counted(own: Made) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.norm.weight"].bits[3] = 0x7FC0
        tensors["lm_head.weight"].bits[1, :2] = 0xFF80

    done = lint(edit(own("plain"), change))
    only(done, "error", "values", "lm_head.weight, model.norm.weight", "element")
    assert found(done)[0].count == 2


def test_a_matrix_of_zeros_is_suspected(own: Made) -> None:
    def change(tensors: Tensors) -> None:
        tensors[UP + ".weight"].bits[:] = 0

    only(lint(edit(own("plain"), change)), "warning", "values", UP + ".weight", "zero")


def test_fp8_codes_that_are_nan_and_scales_that_are_not_positive_are_found(tmp_path: Path) -> None:
    plain = random_checkpoint(tmp_path / "plain", DEEPSEEK)
    fp8 = quantise_fp8(plain, tmp_path / "fp8", BLOCK)
    name = LAYER + "self_attn.q_a_proj.weight"

    def change(tensors: Tensors) -> None:
        tensors[name].bits[1, 1] = 0xFF
        floats(tensors[name + "_scale_inv"])[0, 0] = 0

    errors = found(lint(edit(fp8, change)))
    assert {(f.check, f.where) for f in errors} == {("codes", name), ("scales", name + "_scale_inv")}


def test_all_problems_of_names_and_numbers_are_said_at_once(own: Made) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["model.norm.weight"]
        tensors["something.else"] = tensors["lm_head.weight"]
        tensors[UP + ".weight_scale"] = Stored("F32", tensors[UP + ".weight_scale"].bits[:-1])
        set_scale(-1, 0)(tensors)

    directory = edit(own("dynamic"), change)
    description = json.loads((directory / DESCRIPTION).read_text())
    description[LAYER + "mlp.experts.0.up_proj.weight"] = "FLOAT"
    (directory / DESCRIPTION).write_text(json.dumps(description))
    words = "\n".join(f"{f.where}: {f.problem}" for f in found(lint(directory)))
    for word in (
        "model.norm.weight",
        "something.else",
        UP + ".weight_scale: has shape",
        "described as FLOAT",
        "scales are negative",
    ):
        assert word in words, words


def test_a_fused_group_of_several_types_is_named(made: Made, tmp_path: Path) -> None:
    source = made("plain")

    def types(name: str) -> str:
        return "FLOAT" if name == LAYER + "self_attn.k_proj.weight" else static_attention(name)

    done = lint(modelslim(source, tmp_path / "own", types))
    only(done, "error", "names", "qkv_proj.weight", "k_proj.weight is plain")


def test_an_index_that_is_not_of_these_shards_is_found_beside_other_things(own: Made) -> None:
    directory = edit(own("dynamic"), set_scale(0.0))
    path = directory / "quant_model_weights.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = files[index["weight_map"]["lm_head.weight"] == files[0]]
    path.write_text(json.dumps(index))
    assert [f.check for f in found(lint(directory))] == ["index", "scales"]


def test_a_shard_that_is_cut_off_does_not_hide_the_others(own: Made) -> None:
    directory = edit(own("dynamic"), set_scale(0.0))
    name = (UP + ".weight_scale").encode()
    other = next(p for p in sorted(directory.glob("*.safetensors")) if name not in p.read_bytes())
    other.write_bytes(other.read_bytes()[:-100])
    checks = {f.check for f in found(lint(directory))}
    assert {"files", "scales"} <= checks


def test_experts_left_as_values_under_an_int8_description_are_found(made: Made, tmp_path: Path) -> None:
    def types(name: str) -> str:
        return "FLOAT" if ".experts." in name else all_dynamic(name)

    done = lint(modelslim(made("plain"), tmp_path / "own", types))
    only(done, "error", "experts", "mlp.experts.{0..15}", DESCRIPTION)


def test_stacked_experts_left_as_values_are_found(made: Made, tmp_path: Path) -> None:
    """transformers 5 has experts in one tensor, which ModelSlim does not look into, whatever it says of it."""

    def types(name: str) -> str:
        return "FLOAT" if ".experts." in name else all_dynamic(name)

    directory = modelslim(made("plain"), tmp_path / "own", types)
    described = json.loads((directory / DESCRIPTION).read_text())

    def change(tensors: Tensors) -> None:
        for layer in range(QWEN["num_hidden_layers"]):
            prefix = f"model.layers.{layer}.mlp.experts."
            if prefix + "0.up_proj.weight" not in tensors:
                continue
            gate, up, down = (
                np.stack([tensors.pop(f"{prefix}{e}.{n}_proj.weight").bits for e in range(QWEN["num_experts"])])
                for n in ("gate", "up", "down")
            )
            tensors[prefix + "gate_up_proj"] = Stored("BF16", np.concatenate([gate, up], 1))
            tensors[prefix + "down_proj"] = Stored("BF16", down)
            described.update({prefix + "gate_up_proj": "W8A8_DYNAMIC", prefix + "down_proj": "W8A8_DYNAMIC"})

    edit(directory, change)
    described = {n: t for n, t in described.items() if not re.search(r"\.experts\.\d", n)}
    (directory / DESCRIPTION).write_text(json.dumps(described))
    errors = [f for f in found(lint(directory)) if f.check == "experts"]
    assert len(errors) == 1
    assert "mlp.experts.gate_up_proj" in errors[0].where


def test_prediction_layers_that_are_missing_or_of_another_type_are_found(tmp_path: Path) -> None:
    plain = random_checkpoint(tmp_path / "plain", DEEPSEEK)
    with_mtp = add_mtp(Path(shutil.copytree(plain, tmp_path / "mtp")))

    def types(name: str) -> str:
        return "FLOAT" if name.startswith("model.layers.2.") else all_dynamic(name)

    done = lint(modelslim(with_mtp, tmp_path / "other", types))
    texts = [f.problem for f in found(done, "warning")]
    assert any("attention of multi-token prediction are bfloat16" in t for t in texts), texts
    edit_json(plain / "config.json", num_nextn_predict_layers=1)
    only(lint(plain), "warning", "mtp", "model.layers.2.*")
    edit(with_mtp, lambda tensors: tensors.pop("model.layers.2.hnorm.weight"))
    (error,) = [f for f in lint(with_mtp).findings if f.severity == "error"]
    assert (error.check, "model.layers.2.hnorm.weight" in error.problem) == ("names", True)


def test_a_configuration_that_is_not_supported_hides_nothing(own: Made) -> None:
    directory = edit(own("dynamic"), set_scale(0.0))
    edit_json(directory / "config.json", invented_key=3)
    assert {f.check for f in found(lint(directory))} == {"configuration", "scales"}


# What conversion would refuse


def as_conversion_says(model: Path, tmp_path: Path, name: str, words: str) -> None:
    """Both say it, with the same words."""
    with pytest.raises(CheckpointError) as refused:
        convert(model, tmp_path / "out")
    assert refused.value.message.startswith(name)
    assert words in refused.value.message
    assert [words in f.problem for f in found(lint(model)) if f.where == name] == [True]


def test_an_inputs_scale_that_is_not_shared_is_found(own: Made, tmp_path: Path) -> None:
    name = LAYER + "self_attn.k_proj.input_scale"
    directory = edit(own("mixed"), lambda tensors: floats(tensors[name]).__imul__(2))
    words = f"differs from {Q}.input_scale: they share their input"
    as_conversion_says(directory, tmp_path, name, words)


def test_a_drafts_copy_that_differs_is_found(tmp_path: Path) -> None:
    model = add_mtp(random_checkpoint(tmp_path / "plain", DEEPSEEK))
    name = "model.layers.2.shared_head.head.weight"
    assert lint(model).is_sound

    def change(tensors: Tensors) -> None:
        tensors[name].bits[5, 1] ^= 1

    words = "differs from lm_head.weight, which a server gives its draft too"
    as_conversion_says(edit(model, change), tmp_path, name, words)


def test_a_head_that_is_tied_and_differs_is_found(tmp_path: Path) -> None:
    model = write_synthetic(tmp_path / "model", qwen3_config())
    edit_json(model / "config.json", tie_word_embeddings=True)
    words = "the configuration ties it to model.embed_tokens.weight, but its values are different"
    as_conversion_says(model, tmp_path, "lm_head.weight", words)


@pytest.mark.parametrize(
    "name", [LAYER + "self_attn.q_a_proj.weight", "model.layers.1.mlp.experts.5.up_proj.weight"]
)
def test_values_of_fp8_beyond_the_range_are_found(tmp_path: Path, name: str) -> None:
    fp8 = quantise_fp8(random_checkpoint(tmp_path / "plain", DEEPSEEK), tmp_path / "fp8", BLOCK)

    def change(tensors: Tensors) -> None:
        floats(tensors[name + "_scale_inv"])[0, 0] = 3e38

    as_conversion_says(edit(fp8, change), tmp_path, name, "values are beyond bfloat16's range")


def test_a_large_scale_of_small_codes_is_within_the_range(tmp_path: Path) -> None:
    fp8 = quantise_fp8(random_checkpoint(tmp_path / "plain", DEEPSEEK), tmp_path / "fp8", BLOCK)
    name = LAYER + "self_attn.q_a_proj.weight"

    def change(tensors: Tensors) -> None:
        tensors[name].bits[:] &= 0x0F  # at most 2 ** -6 * 1.875
        floats(tensors[name + "_scale_inv"])[0, 0] = 3e38

    assert lint(edit(fp8, change)).is_sound


# Digests


def in_a_cache(directory: Path, root: Path) -> Path:
    """The files as huggingface_hub keeps them."""
    snapshot, blobs = root / "snapshots" / ("0" * 40), root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in directory.iterdir():
        data = path.read_bytes()
        in_git = hashlib.sha1(b"blob %d\0" % len(data) + data)
        digest = hashlib.sha256(data) if path.suffix == ".safetensors" else in_git
        (blobs / digest.hexdigest()).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest.hexdigest()}")
    return snapshot


def test_a_shard_of_a_cache_that_was_damaged_is_found_by_its_digest(made: Made, tmp_path: Path) -> None:
    snapshot = in_a_cache(made("dynamic"), tmp_path)
    done = lint(snapshot)
    assert (done.digests, done.is_sound) == (2, True)
    damaged = sorted(snapshot.glob("*.safetensors"))[1]
    data = bytearray(damaged.read_bytes())
    data[-7] ^= 1
    damaged.resolve().write_bytes(data)
    only(lint(snapshot), "error", "digest", damaged.name, damaged.resolve().name)


def test_digests_beside_a_downloaded_directory_are_compared(own: Made) -> None:
    directory = own("compressed")
    shard, record = directory / "model.safetensors", directory / ".cache" / "huggingface" / "download"
    record.mkdir(parents=True)
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    (record / "model.safetensors.metadata").write_text(f"{'0' * 40}\n{digest}\n1.0\n")
    assert (lint(directory).digests, lint(directory).is_sound) == (1, True)
    (record / "model.safetensors.metadata").write_text(f"{'0' * 40}\n{'a' * 64}\n1.0\n")
    only(lint(directory), "error", "digest", "model.safetensors", digest)


# The command


def test_the_command_says_what_is_wrong_and_exits_1(own: Made) -> None:
    directory = edit(own("dynamic"), set_scale(0.0))
    done = run_msconv("lint", directory, "--json")
    assert done.code == 1
    assert done.json["ok"] is False
    (error,) = [f for f in done.json["findings"] if f["severity"] == "error"]
    assert error["where"] == UP + ".weight_scale"
    assert done.json["seconds_per_gb"] > 0
    words = run_msconv("lint", directory)
    assert words.code == 1
    assert f"error: scales: {UP}.weight_scale: scales are zero" in words.stderr
    assert "s a GB" in words.stderr
    assert "Traceback" not in words.stderr


def test_sound_checkpoints_exit_0_and_what_is_no_checkpoint_does_not(made: Made, tmp_path: Path) -> None:
    assert run_msconv("lint", made("plain")).code == 0
    assert run_msconv("lint", tmp_path / "nothing").code == 2


def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 8, "head_dim": 128}
    model = write_synthetic(tmp_path / "large", qwen3_config(**sizes, vocab_size=1000))
    size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    done = run_msconv("lint", model, "--json").json
    assert done["bytes_read"] == size > 100 << 20
    assert done["peak_rss_bytes"] < 96 << 20
    assert not done["ok"]  # random bits: some are no numbers
