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


def train_eagle3(
    directory: Path, target: Any, sequences: list[list[int]], layers: list[int], steps: int, **config: Any
) -> Path:
    """A draft that has learnt a little of the target's sequences, in `steps`.  `layers`: whose inputs it reads."""
    import torch

    from msconv.verify.eagle3 import Eagle3Reference

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    values = {**CONFIG, **config}
    often = np.unique([t for s in sequences for t in s[2:]])
    others = np.setdiff1d(np.arange(values["vocab_size"]), often)
    tokens = np.sort(np.concatenate([often[len(often) // 8 :], others[:20]]))  # some are beyond it
    values["draft_vocab_size"] = len(tokens)
    save_eagle3(directory, random_weights(values, rng), tokens, values)
    draft = Eagle3Reference(directory)
    places = {int(t): i for i, t in enumerate(tokens)}
    learnt = []
    for ids in sequences:
        embedded, streams = of_target(target, ids, layers)
        wanted = torch.tensor([places.get(t, -1) for t in ids[2:]])
        learnt.append((embedded[1:-1], streams[:-2], wanted))
    for weight in draft.weights.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(draft.weights.values(), 3e-3)
    for step in range(steps):
        embedded, streams, wanted = learnt[step % len(learnt)]
        logits, _ = draft.forward(embedded[None], draft.narrow(streams)[None])
        loss = torch.nn.functional.cross_entropy(logits[0], wanted, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    weights = {name: weight.detach().numpy() for name, weight in draft.weights.items()}
    return save_eagle3(directory, weights, tokens, values)


def of_target(target: Any, ids: list[int], layers: list[int]) -> tuple[Any, Any]:
    """Of transformers' model: rows of the embedding [T, hidden], and what enters the layers, side by side."""
    import torch

    with torch.no_grad():
        found = target(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return target.get_input_embeddings().weight.detach()[ids], torch.cat([found[i][0] for i in layers], -1)
