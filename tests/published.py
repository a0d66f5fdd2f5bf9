"""What the published mixture-of-experts checkpoints hold: names, types and shapes, no code under test."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # {name: (safetensors type code, shape)}

ITEM = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I32": 4, "I64": 8, "BOOL": 1}


def qwen3_moe(config: dict[str, Any]) -> Tensors:
    """Every tensor of a Qwen3 checkpoint with experts."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    head_dim = config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, q),
            prefix + "self_attn.q_norm.weight": (head_dim,),
            prefix + "self_attn.k_norm.weight": (head_dim,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
        if layer in config["mlp_only_layers"] or (layer + 1) % config["decoder_sparse_step"]:
            shapes |= _mlp(prefix + "mlp.", hidden, config["intermediate_size"])
            continue
        shapes[prefix + "mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            shapes |= _mlp(f"{prefix}mlp.experts.{expert}.", hidden, config["moe_intermediate_size"])
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def deepseek_v3(config: dict[str, Any]) -> Tensors:
    """Every tensor of a DeepSeek-V3 checkpoint: FP8 with scales if the configuration says so, MTP layers last."""
    block = config.get("quantization_config", {}).get("weight_block_size")
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))}
    for layer in range(layers):
        tensors |= _deepseek_layer(config, layer, block)
    tensors["model.norm.weight"] = ("BF16", (hidden,))
    tensors["lm_head.weight"] = ("BF16", (vocab, hidden))
    for layer in range(layers, layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "embed_tokens.weight": ("BF16", (vocab, hidden)),
            prefix + "enorm.weight": ("BF16", (hidden,)),
            prefix + "hnorm.weight": ("BF16", (hidden,)),
            prefix + "eh_proj.weight": ("BF16", (hidden, 2 * hidden)),
        }
        tensors |= _deepseek_layer(config, layer, block)
        tensors |= {
            prefix + "shared_head.norm.weight": ("BF16", (hidden,)),
            prefix + "shared_head.head.weight": ("BF16", (vocab, hidden)),
        }
    return tensors


def write_sparse(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """A checkpoint of zeros that take no room on the disk, in shards of about one size."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    pieces = _split(tensors, shards)
    index: dict[str, str] = {}
    for i, piece in enumerate(pieces, 1):
        name = shard_name(i, len(pieces))
        index |= dict.fromkeys(piece, name)
        head, size = header(piece)
        with (directory / name).open("wb") as f:
            f.write(head)
            f.truncate(len(head) + size)
    if len(pieces) > 1:
        write_index(directory, index, sum(nbytes(*tensor) for tensor in tensors.values()))
    return directory


def header(tensors: Tensors) -> tuple[bytes, int]:
    """What a file that holds these tensors begins with, its length included, and the bytes of its data."""
    entries: dict[str, Any] = {}
    end = 0
    for name, (code, shape) in tensors.items():
        begin, end = end, end + nbytes(code, shape)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(text)) + text, end


def nbytes(code: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM[code]


def shard_name(number: int, shards: int) -> str:
    return "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"


def write_index(directory: Path, weight_map: dict[str, str], size: int) -> None:
    values = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(values))


def _mlp(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (ffn, hidden),
        prefix + "up_proj.weight": (ffn, hidden),
        prefix + "down_proj.weight": (hidden, ffn),
    }


def _deepseek_layer(config: dict[str, Any], layer: int, block: tuple[int, int] | None) -> Tensors:
    hidden, heads, ffn = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    prefix = f"model.layers.{layer}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    kept: Tensors = {
        prefix + "input_layernorm.weight": ("BF16", (hidden,)),
        prefix + "post_attention_layernorm.weight": ("BF16", (hidden,)),
        attention + "kv_a_layernorm.weight": ("BF16", (kv_rank,)),
    }
    matrices: dict[str, tuple[int, ...]] = {
        attention + "kv_a_proj_with_mqa.weight": (kv_rank + rope, hidden),
        attention + "kv_b_proj.weight": (heads * (nope + v), kv_rank),
        attention + "o_proj.weight": (hidden, heads * v),
    }
    if q_rank is None:
        matrices[attention + "q_proj.weight"] = (heads * (nope + rope), hidden)
    else:
        kept[attention + "q_a_layernorm.weight"] = ("BF16", (q_rank,))
        matrices[attention + "q_a_proj.weight"] = (q_rank, hidden)
        matrices[attention + "q_b_proj.weight"] = (heads * (nope + rope), q_rank)
    if layer < config["first_k_dense_replace"]:
        matrices |= _mlp(mlp, hidden, config["intermediate_size"])
    else:
        experts = config["n_routed_experts"]
        kept[mlp + "gate.weight"] = ("BF16", (experts, hidden))
        kept[mlp + "gate.e_score_correction_bias"] = ("F32", (experts,))
        matrices |= _mlp(mlp + "shared_experts.", hidden, ffn * config["n_shared_experts"])
        for expert in range(experts):
            matrices |= _mlp(f"{mlp}experts.{expert}.", hidden, ffn)
    if block is None:
        return kept | {name: ("BF16", shape) for name, shape in matrices.items()}
    for name, shape in matrices.items():
        kept[name] = ("F8_E4M3", shape)
        kept[name + "_scale_inv"] = ("F32", (-(-shape[0] // block[0]), -(-shape[1] // block[1])))
    return kept


def _split(tensors: Tensors, pieces: int) -> list[Tensors]:
    """Runs of about as many bytes each; fewer than asked for if the tensors are too big."""
    total = sum(nbytes(*tensor) for tensor in tensors.values())
    out: dict[int, Tensors] = {}
    begin = 0
    for name, tensor in tensors.items():
        out.setdefault(begin * pieces // total, {})[name] = tensor
        begin += nbytes(*tensor)
    return list(out.values())
