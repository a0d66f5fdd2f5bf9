"""Random drafts of EAGLE3: what is published beside a target, for one that is small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1003,
    "draft_vocab_size": 301,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def make_eagle3(directory: Path, seed: int = 0, layer: str = "midlayer", **config: Any) -> Path:
    """A random draft whose tokens are spread over the target's vocabulary."""
    rng = np.random.default_rng(seed)
    values = {**CONFIG, **config}
    vocab, some = values["vocab_size"], values["draft_vocab_size"]
    tokens = np.sort(rng.choice(vocab, some, replace=False))
    return save_eagle3(directory, random_weights(values, rng), tokens, values, layer)


def random_weights(config: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Float32, by name; the layer's names begin with `midlayer`."""
    hidden, ffn, some = (config[k] for k in ("hidden_size", "intermediate_size", "draft_vocab_size"))
    q, kv = (config["head_dim"] * config[f"num_{k}_heads"] for k in ("attention", "key_value"))
    streams = config.get("num_aux_hidden_states", 3) * hidden

    def matrix(out: int, inner: int) -> Any:
        return rng.normal(0, 0.7 / inner**0.5, (out, inner)).astype(np.float32)

    def norm() -> Any:
        return rng.uniform(0.5, 1.5, hidden).astype(np.float32)

    return {
        "fc.weight": matrix(hidden, streams),
        "midlayer.hidden_norm.weight": norm(),
        "midlayer.input_layernorm.weight": norm(),
        "midlayer.self_attn.q_proj.weight": matrix(q, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": matrix(kv, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": matrix(kv, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": matrix(hidden, q),
        "midlayer.post_attention_layernorm.weight": norm(),
        "midlayer.mlp.gate_proj.weight": matrix(ffn, hidden),
        "midlayer.mlp.up_proj.weight": matrix(ffn, hidden),
        "midlayer.mlp.down_proj.weight": matrix(hidden, ffn),
        "norm.weight": norm(),
        "lm_head.weight": matrix(some, hidden),
    }


def save_eagle3(
    directory: Path, weights: dict[str, Any], tokens: Any, config: dict[str, Any], layer: str = "midlayer"
) -> Path:
    """Write a draft whose i-th token is `tokens[i]` of the target's."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    named = {name.replace("midlayer", layer): value for name, value in weights.items()}
    reached = np.zeros(config["vocab_size"], bool)
    reached[tokens] = True
    named |= {"d2t": (tokens - np.arange(len(tokens))).astype(np.int64), "t2d": reached}
    save_file(named, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory
