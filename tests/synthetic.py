"""Qwen3 checkpoints written as bytes, from what is published about the model: no torch, no code under test."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]

ITEM = {"BF16": 2, "F16": 2, "F32": 4}


def qwen3_config(**changes: Any) -> dict[str, Any]:
    """A configuration in the published spelling, of a model with one layer and a few numbers."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 23,
        **changes,
    }


def qwen3_shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor of a Qwen3 checkpoint and its shape."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
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
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
        }
        if config.get("attention_bias"):
            shapes |= {
                f"{prefix}self_attn.{part}_proj.bias": (rows,)
                for part, rows in (("q", q), ("k", kv), ("v", kv), ("o", hidden))
            }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def write_synthetic(
    directory: Path,
    config: dict[str, Any],
    shards: int = 1,
    code: str = "BF16",
    seed: int = 0,
    sparse: bool = False,
) -> Path:
    """A checkpoint of random bits; with `sparse`, of zeros that take no room on the disk."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    index: dict[str, str] = {}
    for i, shapes in enumerate(_split(qwen3_shapes(config), shards), 1):
        name = "model.safetensors" if shards == 1 else f"model-{i:05d}-of-{shards:05d}.safetensors"
        index |= dict.fromkeys(shapes, name)
        header, size = describe(shapes, code)
        with (directory / name).open("wb") as f:
            f.write(struct.pack("<Q", len(header)) + header)
            if sparse:
                f.truncate(8 + len(header) + size)
            else:
                f.write(rng.bytes(size))
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def describe(shapes: Shapes, code: str) -> tuple[bytes, int]:
    """The header of a file that holds these tensors one after another, and the bytes of its data."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * ITEM[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    return json.dumps(header).encode(), end


def digests(directory: Path) -> dict[str, str]:
    """Every file that an artifact promises and the digest of its bytes (all but .msconv and the report)."""
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and ".msconv" not in path.parts and path.name != "report.html":
            with path.open("rb") as f:
                found[str(path.relative_to(directory))] = hashlib.file_digest(f, "blake2b").hexdigest()
    return found


def _split(shapes: Shapes, pieces: int) -> list[Shapes]:
    names = list(shapes)
    step = -(-len(names) // pieces)
    return [{n: shapes[n] for n in names[i : i + step]} for i in range(0, len(names), step)]
