"""Rank files as arrays: the stored bits, and only casts that lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from msconv.steps.conversion import run
from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.weights import LoadMode, RankWeights
from msconv_runtime.errors import ArtifactError
from tests.checkpoints import read_rank
from tests.conftest import Checkpoints
from tests.conversions import prepare


def weights_of(model: Path, output: Path, rank: int = 0, mode: LoadMode = "mmap") -> RankWeights:
    if not output.exists():
        run(prepare(model, 2, output=output))
    return RankWeights(Artifact(output), rank, mode)


@pytest.mark.parametrize("mode", get_args(LoadMode))
@pytest.mark.parametrize("variant", ["untied", "float16", "bfloat16_shards"])
def test_arrays_are_the_stored_bits(checkpoint: Checkpoints, tmp_path: Path, variant: str, mode: LoadMode) -> None:
    for rank in (0, 1):
        weights = weights_of(checkpoint(variant), tmp_path / "out", rank, mode)
        stored = read_rank(tmp_path / "out", rank)
        assert set(weights.tensors) == set(stored)
        for name, tensor in stored.items():
            assert np.array_equal(weights.raw(name).view(tensor.bits.dtype), tensor.bits)


@pytest.mark.parametrize("variant", ["untied", "float16", "bfloat16_shards"])
def test_widening_to_float32_is_exact(checkpoint: Checkpoints, tmp_path: Path, variant: str) -> None:
    weights = weights_of(checkpoint(variant), tmp_path / "out")
    bits = read_rank(tmp_path / "out", 0)["model.norm.weight"].bits
    expected = {
        "untied": lambda: bits.view(np.float32),
        "float16": lambda: bits.view(np.float16).astype(np.float32),
        "bfloat16_shards": lambda: (bits.astype(np.uint32) << 16).view(np.float32),
    }[variant]()
    found, cast = weights.array("model.norm.weight", "float32")
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    assert cast == (variant != "untied")


@pytest.mark.parametrize(
    ("variant", "dtype"), [("untied", "float16"), ("untied", "bfloat16"), ("bfloat16_shards", "float16")]
)
def test_a_cast_to_16_bits_rounds_as_torch_does(
    checkpoint: Checkpoints, tmp_path: Path, variant: str, dtype: str
) -> None:
    import torch

    weights = weights_of(checkpoint(variant), tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    wide, _ = weights.array(name, "float32")
    found, cast = weights.array(name, dtype)
    right = torch.from_numpy(wide.copy()).to(getattr(torch, dtype))
    assert cast
    assert np.array_equal(found.view(np.int16), right.view(torch.int16).numpy())


def test_no_cast_makes_integers_of_weights(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight: stored as .*int32"):
        weights_of(checkpoint("float16"), tmp_path / "out").array("model.norm.weight", "int32")


def test_writing_into_mapped_weights_leaves_the_file_alone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    weights = weights_of(checkpoint("untied"), tmp_path / "out")
    before = (tmp_path / "out/weights/model-rank-0-part-0.safetensors").read_bytes()
    weights.raw("model.norm.weight")[:] = 0
    assert (tmp_path / "out/weights/model-rank-0-part-0.safetensors").read_bytes() == before


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_there_is_not_is_refused(checkpoint: Checkpoints, tmp_path: Path, rank: int) -> None:
    with pytest.raises(ArtifactError, match="ranks 0 to 1"):
        weights_of(checkpoint("untied"), tmp_path / "out", rank)


def test_a_truncated_rank_file_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    weights_of(checkpoint("untied"), tmp_path / "out")
    path = tmp_path / "out/weights/model-rank-0-part-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="model-rank-0-part-0"):
        weights_of(checkpoint("untied"), tmp_path / "out")
