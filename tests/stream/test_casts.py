"""Casts and dropped tensors: torch's bits, and nothing lost without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from msconv_runtime.artifact import read_manifest
from msconv_runtime.errors import (
    CheckpointError,
)
from tests.checkpoints import (
    Bits,
    Stored,
    read_checkpoint,
    read_rank,
    write_safetensors,
)
from tests.conftest import Checkpoints
from tests.conversions import config_of, convert, join


def all_16_bit_values() -> Bits:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def values_for(source: str, target: str) -> Bits:
    """Bits of `source` that `target` can hold: every value of 16 bits, or many random ones and the edges."""
    import torch

    if source == "float32":
        rng = np.random.default_rng(3)
        edges = [0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x3F800000, 0x3F808000, 0x3F818000, 0x33000000]
        edges += [0x33000001, 0x477FE000, 0x477FEFFF, 0x38800000, 0x387FFFFF, 0x7F7F7FFF]
        bits = np.concatenate([np.array(edges, np.uint32), rng.integers(0, 2**32, 100_000, np.uint32)])
    else:
        bits = all_16_bit_values()
    wide = torch.from_numpy(bits.view(np.int32 if source == "float32" else np.int16))
    floats = wide.view(getattr(torch, source)).to(torch.float32)
    keep = ~torch.isnan(floats)  # which NaN a NaN becomes is nobody's promise
    if target == "float16":
        keep &= torch.isinf(floats) | ~torch.isinf(floats.to(torch.float16))
    return bits[keep.numpy()]


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("variant", "source"), [("untied", "float32"), ("float16", "float16"), ("bfloat16_shards", "bfloat16")]
)
def test_casts_are_torchs_bit_for_bit(
    checkpoint: Checkpoints, tmp_path: Path, variant: str, source: str, target: str
) -> None:
    import torch

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((checkpoint(variant) / "config.json").read_bytes())
    tensors = read_checkpoint(checkpoint(variant))
    values = values_for(source, target)
    name = "model.embed_tokens.weight"
    tensors[name] = Stored(tensors[name].code, np.resize(values, tensors[name].bits.shape))
    write_safetensors(model / "model.safetensors", tensors)

    convert(model, tmp_path / "out", 2, dtype=target)

    found = join(tmp_path / "out", 2, config_of(model))
    for name, tensor in tensors.items():
        signed = tensor.bits.view(np.int32 if source == "float32" else np.int16)
        cast = torch.from_numpy(signed.copy()).view(getattr(torch, source)).to(getattr(torch, target))
        expected = cast.view(torch.int32 if target == "float32" else torch.int16).numpy()
        assert np.array_equal(found[name], expected.view(found[name].dtype)), name


def test_not_a_number_stays_not_a_number(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((checkpoint("untied") / "config.json").read_bytes())
    tensors = read_checkpoint(checkpoint("untied"))
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], np.uint32)
    tensors["model.norm.weight"] = Stored("F32", np.resize(nans, 128))
    write_safetensors(model / "model.safetensors", tensors)
    for dtype, infinity in (("bfloat16", 0x7F80), ("float16", 0x7C00)):
        convert(model, tmp_path / dtype, dtype=dtype)
        bits = read_rank(tmp_path / dtype, 0)["model.norm.weight"].bits
        assert ((bits & 0x7FFF) > infinity).all()


@pytest.mark.parametrize(
    ("variant", "huge"), [("untied", 65520.0), ("untied", -1e30), ("bfloat16_shards", 65536.0)]
)
def test_values_beyond_float16_are_an_error_that_names_the_tensor(
    checkpoint: Checkpoints, tmp_path: Path, variant: str, huge: float
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((checkpoint(variant) / "config.json").read_bytes())
    tensors = read_checkpoint(checkpoint(variant))
    name = "model.layers.2.mlp.down_proj.weight"
    bits = tensors[name].bits.copy()
    wide = np.array(huge, np.float32).view(np.uint32)
    bits[7, 9] = wide if bits.itemsize == 4 else wide >> 16
    tensors[name] = Stored(tensors[name].code, bits)
    write_safetensors(model / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        convert(model, tmp_path / "out", 2, dtype="float16")
    assert name in caught.value.message
    assert "float16" in caught.value.message
    assert "bfloat16" in caught.value.hint
    assert not (tmp_path / "out" / "READY").exists()


def test_a_cast_is_recorded(checkpoint: Checkpoints, tmp_path: Path) -> None:
    convert(checkpoint("bfloat16_shards"), tmp_path / "out", dtype="float32")
    weights = read_manifest(tmp_path / "out").weights
    assert weights is not None
    assert (weights.source_dtype, weights.dtype) == ("bfloat16", "float32")


# Tied heads


def with_head(checkpoint: Checkpoints, directory: Path, change: Callable[[Bits], Bits]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_bytes((checkpoint("tied") / "config.json").read_bytes())
    tensors = read_checkpoint(checkpoint("tied"))
    tensors["lm_head.weight"] = Stored("F32", change(tensors["model.embed_tokens.weight"].bits))
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def flip_last_bit(bits: Bits) -> Bits:
    out = bits.copy()
    out[-1, -1] ^= 1
    return out


def test_a_redundant_tied_head_is_dropped_and_the_reason_recorded(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = with_head(checkpoint, tmp_path / "model", lambda bits: bits)
    convert(model, tmp_path / "out", 2)
    assert "lm_head.weight" not in read_rank(tmp_path / "out", 0)
    weights = read_manifest(tmp_path / "out").weights
    assert weights is not None
    assert [(d.name, d.count) for d in weights.dropped] == [("lm_head.weight", 1)]
    assert "tied to model.embed_tokens.weight" in weights.dropped[0].reason


@pytest.mark.parametrize(
    "change",
    [flip_last_bit, lambda bits: bits[:-1], lambda bits: bits[::-1]],
    ids=["one bit", "a row less", "turned"],
)
def test_a_tied_head_with_values_of_its_own_is_an_error(
    checkpoint: Checkpoints, tmp_path: Path, change: Callable[[Bits], Bits]
) -> None:
    model = with_head(checkpoint, tmp_path / "model", change)
    with pytest.raises(CheckpointError) as caught:
        convert(model, tmp_path / "out", 2)
    assert "lm_head.weight" in caught.value.message
    assert "tie_word_embeddings" in caught.value.hint
    assert not (tmp_path / "out" / "READY").exists()
