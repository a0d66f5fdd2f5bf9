"""Random checkpoints with experts, Qwen3 and DeepSeek, and the published FP8 form of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import Bits, Stored, edit_json, read_checkpoint, read_safetensors, write_safetensors
from tests.published import ITEM, header, shard_name, write_index

Block = tuple[int, int]

SMALL_QWEN3_MOE: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "mlp_only_layers": [1],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default"},
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_DEEPSEEK_V3: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QUANTISED = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")  # but not the MTP layer's eh_proj
E4M3_MAX = 448.0


def make_qwen3_moe(
    directory: Path, dtype: str = "float32", shards: int = 1, seed: int = 0, **overrides: Any
) -> Path:
    """A random Qwen3 checkpoint with experts, written by transformers.  Norms are random too."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_values(SMALL_QWEN3_MOE, overrides)))
    _randomise(model)
    return _save(model.to(getattr(torch, dtype)), directory, shards)


def make_deepseek_v3(
    directory: Path, dtype: str = "float32", shards: int = 1, seed: int = 0, **overrides: Any
) -> Path:
    """A random DeepSeek-V3 checkpoint, written by transformers.  Norms and the experts' bias are random too."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**_values(SMALL_DEEPSEEK_V3, overrides)))
    _randomise(model)
    model = model.to(getattr(torch, dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # published in float32, whatever the weights are
            buffer.data = torch.randn(buffer.shape, dtype=torch.float32) * 0.1
    return _save(model, directory, shards)


def quantise_fp8(source: Path, directory: Path, block: Block = (128, 128), shards: int = 1, seed: int = 0) -> Path:
    """A copy in the published FP8 form.  The seed deals the tensors to the shards, each scale to the next one."""
    directory.mkdir(parents=True)
    shutil.copy(source / "config.json", directory)
    quantisation = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    edit_json(directory / "config.json", quantization_config={**quantisation, "weight_block_size": list(block)})
    tensors = read_checkpoint(source)
    deal = np.random.default_rng(seed).permutation(len(tensors)) % shards
    files: list[dict[str, Stored]] = [{} for _ in range(shards)]
    for (name, tensor), shard in zip(tensors.items(), deal, strict=True):
        if QUANTISED.search(name):
            bits, scales = quantise(widen(tensor), block)
            files[shard][name] = Stored("F8_E4M3", bits)
            files[(shard + 1) % shards][name + "_scale_inv"] = Stored("F32", scales.view(np.uint32))
        else:
            files[shard][name] = tensor
    _write(directory, files)
    return directory


def add_mtp(directory: Path) -> Path:
    """Adds the layer that predicts one token more: the last layer's tensors upside down, and six of its own."""
    config = json.loads((directory / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    paths = sorted(directory.glob("*.safetensors"))
    files = [read_safetensors(path) for path in paths]
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    last, prefix = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    layer = {
        name.replace(last, prefix): Stored(tensor.code, np.ascontiguousarray(tensor.bits[::-1]))
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    assert prefix + "mlp.gate.weight" in layer, "the last layer has no experts"
    norm, head = tensors["model.norm.weight"], tensors["lm_head.weight"]
    layer |= {
        prefix + "embed_tokens.weight": tensors["model.embed_tokens.weight"],
        prefix + "enorm.weight": norm,
        prefix + "hnorm.weight": Stored(norm.code, norm.bits[::-1].copy()),
        prefix + "eh_proj.weight": Stored(head.code, np.resize(head.bits, (hidden, 2 * hidden))),
        prefix + "shared_head.norm.weight": norm,
        prefix + "shared_head.head.weight": head,
    }
    for path in paths:
        path.unlink()
    _write(directory, [*files, layer] if len(files) > 1 else [tensors | layer])
    edit_json(directory / "config.json", num_nextn_predict_layers=1)
    return directory


def widen(tensor: Stored) -> NDArray[np.float32]:
    """The values of a stored tensor in float32."""
    if tensor.code == "BF16":
        return (tensor.bits.astype(np.uint32) << 16).view(np.float32)
    if tensor.code == "F8_E4M3":
        return E4M3[tensor.bits]
    return tensor.bits.view({"F32": np.float32, "F16": np.float16}[tensor.code]).astype(np.float32)


def quantise(values: NDArray[np.float32], block: Block = (128, 128)) -> tuple[Bits, NDArray[np.float32]]:
    """The e4m3 bits of a matrix and one scale for each of its blocks."""
    import ml_dtypes

    rows, columns = values.shape
    scales = np.ones((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    for i, j in np.ndindex(scales.shape):
        largest = np.abs(values[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]).max()
        scales[i, j] = largest / np.float32(E4M3_MAX) or 1.0
    scaled = values / _spread(scales, values.shape, block)
    return scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scales


def dequantise(bits: Bits, scales: Bits, block: Block = (128, 128)) -> NDArray[np.float32]:
    """The published rule: each value, as float32, times the scale of its block (as float32 or as its bits)."""
    assert scales.shape == (-(-bits.shape[0] // block[0]), -(-bits.shape[1] // block[1]))
    product: NDArray[np.float32] = E4M3[bits] * _spread(scales.view(np.float32), bits.shape, block)
    return product


def dequantised(fp8: Path, directory: Path) -> Path:
    """An FP8 checkpoint as what transformers can load here: bfloat16, to which conversion rounds it too."""
    directory.mkdir()
    config = json.loads((fp8 / "config.json").read_text())
    block = config.pop("quantization_config")["weight_block_size"]
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    tensors = read_checkpoint(fp8)
    after = f"model.layers.{config['num_hidden_layers']}."
    plain: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv") or name.startswith(after):
            continue
        if tensor.code == "F8_E4M3":
            values = dequantise(tensor.bits, tensors[name + "_scale_inv"].bits, tuple(block))
            tensor = Stored("F32", round_to_bfloat16(values).view(np.uint32))
        plain[name] = tensor
    write_safetensors(directory / "model.safetensors", plain)
    return directory


def round_to_bfloat16(values: Any) -> Any:
    """float32 values that bfloat16 holds, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _e4m3() -> NDArray[np.float32]:
    """All 256 values: a sign, four bits of exponent with bias 7, three of mantissa; two NaN, no infinity."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[code & 127 == 127] = np.nan
    values: NDArray[np.float32] = np.where(code < 128, size, -size).astype(np.float32)
    return values


E4M3 = _e4m3()


def _spread(scales: NDArray[np.float32], shape: tuple[int, ...], block: Block) -> NDArray[np.float32]:
    """The scale of every element."""
    spread: NDArray[np.float32] = scales[np.arange(shape[0])[:, None] // block[0], np.arange(shape[1]) // block[1]]
    return spread


def _values(defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    values = {**defaults, **overrides}
    theta = values.pop("rope_theta")
    values["rope_parameters"] = {"rope_theta": theta, **values["rope_parameters"]}
    return values


def _randomise(model: Any) -> None:
    """Random norms and biases, and routers that tell the experts well apart but let each chosen one count."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)


def _save(model: Any, directory: Path, shards: int) -> Path:
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    model.save_pretrained(directory, max_shard_size=size + 1 if shards == 1 else -(-size // shards))
    return directory


def _write(directory: Path, files: list[dict[str, Stored]]) -> None:
    """The files of a checkpoint as the library writes them: wide types first, so that all data is aligned."""
    weight_map: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, 1):
        name = shard_name(number, len(files))
        ordered = dict(sorted(file.items(), key=lambda item: (-ITEM[item[1].code], item[0])))
        head, length = header({key: (tensor.code, tensor.bits.shape) for key, tensor in ordered.items()})
        (directory / name).write_bytes(head + b"".join(tensor.bits.tobytes() for tensor in ordered.values()))
        weight_map |= dict.fromkeys(ordered, name)
        size += length
    if len(files) > 1:
        write_index(directory, weight_map, size)
