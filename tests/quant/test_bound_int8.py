"""Int8 tensors and their scales, from rank files to graphs: as they are stored, or exactly, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from msconv.mindir.kernels import Context
from msconv.mindir.kernels.int8 import as_float
from msconv.steps.compile import compile_graphs
from msconv.verify.rank_files import RankFiles
from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.weights import RankWeights
from msconv_runtime.binding import load_weights
from msconv_runtime.errors import ArtifactError
from tests.conversions import convert
from tests.moe_checkpoints import make_qwen3_moe

EXPERTS = "model.layers.0.mlp.experts.down_proj.weight"
DENSE = "model.layers.1.mlp.gate_up_proj.weight"
SCALE = "_scale"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """tp 2, matrices int8 with a scale a token."""
    model = make_qwen3_moe(tmp_path / "model", dtype="bfloat16", num_hidden_layers=2)
    convert(model, tmp_path / "out", 2, ep=2, quant="w8a8")
    return Artifact(tmp_path / "out")


def nudge(artifact: Artifact, name: str, rank: int) -> None:
    """Make a scale the next float32."""
    weights = artifact.weights
    entry = next(t for t in weights.tensors if t.name == name)
    path = [f for f in weights.files if f.rank == rank][entry.file].path
    data = np.memmap(artifact.root / path, np.uint8, "r+")
    data[entry.begin : entry.begin + entry.nbytes].view(np.uint32)[3] += 1
    data.flush()


def test_codes_and_scales_come_as_they_are_stored(artifact: Artifact) -> None:
    weights = RankWeights(artifact, 1)
    codes, was_cast = weights.array(DENSE, "int8")
    assert codes.dtype == np.int8 and not was_cast
    assert weights.is_scale(DENSE + SCALE) and not weights.is_scale(DENSE)
    for exact in (True, False):
        files = RankFiles(artifact, 1, Context(exact, torch.bfloat16), keep=False)
        assert np.array_equal(files.get(DENSE, torch.int8).numpy(), codes)
        scale = files.get(DENSE + SCALE, torch.float32)
        assert scale.dtype == torch.float32
        assert np.array_equal(scale.numpy(), weights.raw(DENSE + SCALE))
    bound = RankFiles(artifact, 1, Context(True, torch.bfloat16), keep=False, as_bound=True)
    assert np.array_equal(bound.get(EXPERTS + SCALE, torch.bfloat16).numpy(), weights.raw(EXPERTS + SCALE))


def test_scales_as_bits_are_the_same_for_server_and_proof(artifact: Artifact) -> None:
    found, was_cast = RankWeights(artifact, 0).array(DENSE + SCALE, "int64")
    files = RankFiles(artifact, 0, Context(True, torch.float16), keep=False)
    assert was_cast and found.dtype == np.int64
    assert np.array_equal(files.get(DENSE + SCALE, torch.int64).numpy(), found)
    assert np.array_equal(as_float(torch.from_numpy(found)).numpy(), RankWeights(artifact, 0).raw(DENSE + SCALE))


@pytest.mark.slow
def test_a_scale_that_is_no_bfloat16_value_is_refused(artifact: Artifact) -> None:
    graphs = [made.graph for made in compile_graphs(artifact.root, "ascend910b")]
    again = Artifact(artifact.root)
    found = load_weights(again, graphs, 1, "mmap", check=False)
    assert str(found[EXPERTS + SCALE].dtype) == "BFloat16"
    assert str(found[DENSE].dtype) == "Int8"
    nudge(artifact, EXPERTS + SCALE, rank=1)
    load_weights(again, graphs, 0, "mmap", check=False)
    told = r"down_proj\.weight_scale: 1 of \d+ scales, .* are no bfloat16 values"
    with pytest.raises(ArtifactError, match=told):
        load_weights(again, graphs, 1, "mmap", check=False)
    with pytest.raises(ArtifactError, match=told):
        compile_graphs(artifact.root, "ascend910c")
    compile_graphs(artifact.root, "cpu")  # which takes float32
