"""Small checkpoints whose every byte follows from the seed: NumPy's integers only, no torch, no rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.published import ITEM, Tensors, deepseek_v3, header, qwen3_moe, shard_name, write_index
from tests.synthetic import qwen3_config, qwen3_shapes

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
QWEN3: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "vocab_size": 203,  # no tp divides it
}
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 203,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 40,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7},
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 203,
}
EAGLE3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 203,
    "draft_vocab_size": 101,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [16, 24],  # divides few of the sizes
}


def qwen3(config: dict[str, Any]) -> Tensors:
    """Every tensor of a Qwen3 checkpoint."""
    return {name: ("BF16", shape) for name, shape in qwen3_shapes(config).items()}


def without_copies(config: dict[str, Any]) -> Tensors:
    """A layer of multi-token prediction without an embedding and a head of its own."""
    copies = (".2.embed_tokens.weight", ".2.shared_head.head.weight")
    return {name: tensor for name, tensor in deepseek_v3(config).items() if not name.endswith(copies)}


def eagle3(config: dict[str, Any]) -> Tensors:
    """Every tensor of a draft of EAGLE3."""
    hidden, ffn, some = (config[key] for key in ("hidden_size", "intermediate_size", "draft_vocab_size"))
    q, kv = (config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes = {
        "fc.weight": (hidden, 3 * hidden),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, q),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.mlp.gate_proj.weight": (ffn, hidden),
        "midlayer.mlp.up_proj.weight": (ffn, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, ffn),
        "norm.weight": (hidden,),
        "lm_head.weight": (some, hidden),
    }
    named: Tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
    return named | {"d2t": ("I64", (some,)), "t2d": ("BOOL", (config["vocab_size"],))}


MODELS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Tensors]]] = {
    "qwen3": (qwen3_config(**QWEN3), qwen3),
    "qwen3 tied": (qwen3_config(**QWEN3, tie_word_embeddings=True), qwen3),
    "qwen3 yarn": (qwen3_config(**QWEN3, rope_scaling=YARN), qwen3),
    "qwen3 bias": (qwen3_config(**QWEN3, attention_bias=True), qwen3),
    "qwen3_moe": (QWEN3_MOE, qwen3_moe),
    "deepseek_v3": (DEEPSEEK_V3, deepseek_v3),
    "deepseek_v3 fp8": (DEEPSEEK_V3 | {"quantization_config": FP8}, deepseek_v3),
    "eagle3": (EAGLE3, eagle3),
    "deepseek_v3 draft": (DEEPSEEK_V3 | {"quantization_config": FP8}, without_copies),
}


def write_model(directory: Path, name: str) -> Path:
    """The checkpoint of a model of the list, made in `directory`.  Returns it."""
    config, tensors_of = MODELS[name]
    return write_checkpoint(directory, config, tensors_of(config))


def write_checkpoint(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 2) -> Path:
    """A checkpoint of random values.  A scale lies beside its tensor, or in another shard."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(20260)
    files: list[Tensors] = [{} for _ in range(shards)]
    for i, key in enumerate(sorted(tensors, key=lambda key: (-ITEM[tensors[key][0]], key))):
        files[i % shards][key] = tensors[key]
    index: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        path = directory / shard_name(number, shards)
        head, _ = header(file)
        path.write_bytes(head + b"".join(random_bytes(rng, key, *tensor) for key, tensor in file.items()))
        index |= dict.fromkeys(file, path.name)
    if shards > 1:
        write_index(directory, index, sum(math.prod(shape) * ITEM[code] for code, shape in tensors.values()))
    return directory


def random_bytes(rng: np.random.Generator, name: str, code: str, shape: tuple[int, ...]) -> bytes:
    """A tensor's values, little-endian.  All but FP8 codes and their scales are whole numbers of 256ths below one
    half (norms: between one half and one), which every type of the list can hold."""
    if code == "F8_E4M3":
        codes = rng.integers(0, 127, shape, np.uint8)  # 127 and 255 are NaN
        return (codes | rng.integers(0, 2, shape, np.uint8) << 7).tobytes()
    if code in ("I64", "BOOL"):  # the draft's token i is the target's 2 i
        places = np.arange(math.prod(shape))
        return (places.astype(np.int64) if code == "I64" else places % 2 == 0).tobytes()
    if name.endswith("_scale_inv"):
        return (rng.integers(1 << 20, 1 << 23, shape).astype(np.float32) / np.float32(1 << 33)).tobytes()
    low, high = (128, 256) if name.endswith("norm.weight") else (-127, 128)
    values = rng.integers(low, high, shape).astype(np.float32) / np.float32(256)
    return values.tobytes() if code == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
