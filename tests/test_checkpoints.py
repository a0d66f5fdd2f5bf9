"""The checkpoints that the tests make are what transformers reads and what is published."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import Stored, read_checkpoint
from tests.conversions import config_of
from tests.moe_checkpoints import (
    E4M3,
    add_mtp,
    dequantise,
    make_deepseek_v3,
    make_qwen3_moe,
    quantise,
    quantise_fp8,
)
from tests.published import Tensors, deepseek_v3, nbytes, qwen3_moe, write_sparse

CONFIGS = Path(__file__).parent / "data" / "configs"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deepseek_v3(tmp_path_factory.mktemp("moe") / "deepseek", dtype="bfloat16", shards=3)


@pytest.mark.parametrize(
    ("name", "build", "count", "size"),
    [
        ("DeepSeek-V3", deepseek_v3, 91_991, 688_574_839_360),
        ("Qwen3-30B-A3B", qwen3_moe, 18_867, 61_064_245_248),
        ("Qwen3-235B-A22B", qwen3_moe, 36_945, 470_187_269_120),
    ],
)
def test_published_counts(name: str, build: Callable[..., Tensors], count: int, size: int, tmp_path: Path) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    tensors = build(config)
    assert len(tensors) == count
    assert sum(nbytes(*tensor) for tensor in tensors.values()) == size
    directory = write_sparse(tmp_path / "model", config, tensors, 20)
    assert len(list(directory.glob("*.safetensors"))) == 20
    assert sum(path.stat().st_blocks * 512 for path in directory.iterdir()) < 50e6


def test_published_deepseek() -> None:
    tensors = deepseek_v3(json.loads((CONFIGS / "DeepSeek-V3.json").read_text()))
    layers = {i: [n for n in tensors if n.startswith(f"model.layers.{i}.")] for i in (0, 3, 61)}
    scales = {i: [n for n in names if n.endswith("_scale_inv")] for i, names in layers.items()}
    assert {i: len(names) for i, names in layers.items()} == {0: 20, 3: 782 + 776, 61: 782 + 776 + 6}
    assert {i: len(names) for i, names in scales.items()} == {0: 8, 3: 776, 61: 776}
    attention = "model.layers.60.self_attn."
    assert tensors[attention + "kv_a_proj_with_mqa.weight"] == ("F8_E4M3", (576, 7168))
    assert tensors[attention + "kv_a_proj_with_mqa.weight_scale_inv"] == ("F32", (5, 56))
    values = sum(math.prod(shape) for name, (_, shape) in tensors.items() if not name.endswith("_scale_inv"))
    assert round(values / 1e9) == 684  # 685 billion, says the model's page: 684.49


@pytest.mark.parametrize(
    ("make", "build", "overrides"),
    [
        (make_qwen3_moe, qwen3_moe, {}),
        (make_qwen3_moe, qwen3_moe, {"mlp_only_layers": [], "decoder_sparse_step": 2}),
        (make_deepseek_v3, deepseek_v3, {}),
        (make_deepseek_v3, deepseek_v3, {"q_lora_rank": None, "n_shared_experts": 2}),
    ],
)
def test_transformers_writes_the_published_names(
    make: Callable[..., Path],
    build: Callable[..., Tensors],
    overrides: dict[str, Any],
    tmp_path: Path,
) -> None:
    model = make(tmp_path / "model", dtype="bfloat16", **overrides)
    assert described(read_checkpoint(model)) == build(config_of(model))


@pytest.mark.parametrize("make", [make_qwen3_moe, make_deepseek_v3])
@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_reads_them_back(make: Callable[..., Path], shards: int, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory = make(tmp_path / "model", shards=shards)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (shards > 1)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        logits = model(torch.arange(3, 40)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.5
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert all(bias.std() > 0.02 for bias in biases)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("mtp_first", [True, False])
def test_fp8_with_mtp(deepseek: Path, shards: int, mtp_first: bool, tmp_path: Path) -> None:
    source = Path(shutil.copytree(deepseek, tmp_path / "source"))
    if mtp_first:
        fp8 = quantise_fp8(add_mtp(source), tmp_path / "fp8", shards=shards)
    else:
        fp8 = add_mtp(quantise_fp8(source, tmp_path / "fp8", shards=shards))
    tensors = read_checkpoint(fp8)
    assert described(tensors) == deepseek_v3(config_of(fp8))
    if shards > 1:
        files = json.loads((fp8 / "model.safetensors.index.json").read_text())["weight_map"]
        assert files.keys() == tensors.keys()
        scaled = [n for n in files if n + "_scale_inv" in files and (mtp_first or ".layers.3." not in n)]
        assert all(files[n] != files[n + "_scale_inv"] for n in scaled)


@pytest.mark.parametrize("block", [(128, 128), (16, 40)])
def test_fp8_is_close_to_its_source(deepseek: Path, block: tuple[int, int], tmp_path: Path) -> None:
    before = read_checkpoint(deepseek)
    after = read_checkpoint(quantise_fp8(deepseek, tmp_path / "fp8", block, shards=2, seed=1))
    for name, tensor in before.items():
        if name + "_scale_inv" in after:
            scales = after[name + "_scale_inv"].bits
            wanted = (tensor.bits.astype(np.uint32) << 16).view(np.float32)
            error = np.abs(dequantise(after[name].bits, scales, block) - wanted)
            # Half a step of three bits, or half of the smallest number there is.
            assert np.all(error <= np.maximum(np.abs(wanted) / 16, scales.view(np.float32).max() / 1024) * 1.0001)
        else:
            assert after[name].code == tensor.code
            assert np.array_equal(after[name].bits, tensor.bits)


def test_e4m3_is_torchs() -> None:
    import torch

    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3, every, equal_nan=True)
    values = np.random.default_rng(0).normal(0, 1, (64, 64)).astype(np.float32)
    bits, scales = quantise(values)
    rounded = torch.from_numpy(values / scales).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(bits, rounded)


def described(tensors: dict[str, Stored]) -> Tensors:
    return {name: (tensor.code, tensor.bits.shape) for name, tensor in tensors.items()}
