"""The tests' writer of ModelSlim's format against what the tool itself wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import read_safetensors
from tests.modelslim import STEM, mixed, write_modelslim
from tests.moe_checkpoints import make_qwen3_moe

pytestmark = pytest.mark.slow

# names, types, element types and shapes of layers 0 and 1, expert 0, in the output of msmodelslim 26.1.0
WRITTEN = Path(__file__).parents[1] / "data" / "modelslim" / "qwen3_moe.json"
ABOUT_ALL = {"version", "model_quant_type", "metadata", "group_size", "optional"}


def test_names_types_and_shapes_are_the_tools(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 208, "vocab_size": 1024, "head_dim": 24}
    plain = make_qwen3_moe(tmp_path / "plain", "bfloat16", num_hidden_layers=2, **sizes)
    root = write_modelslim(plain, tmp_path / "slim", mixed)
    described = json.loads((root / "quant_model_description.json").read_text())
    tensors = read_safetensors(root / f"{STEM}-00001-of-00001.safetensors")
    index = json.loads((root / f"{STEM}.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors) == set(described) - ABOUT_ALL
    wanted = json.loads(WRITTEN.read_text())
    found = {
        name: [described[name], tensor.code, list(tensor.bits.shape)]
        for name, tensor in tensors.items()
        if ".experts." not in name or ".experts.0." in name
    }
    assert found == {name: entry for name, entry in wanted.items() if name not in ABOUT_ALL}
    assert {name: described[name] for name in ABOUT_ALL - {"model_quant_type"}} == {
        name: wanted[name] for name in ABOUT_ALL - {"model_quant_type"}
    }
    assert "quantization_config" not in json.loads((root / "config.json").read_text())
