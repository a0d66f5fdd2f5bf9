"""What a rank must read and multiply, counted from the names and shapes that a checkpoint's headers have and from
formulas of its config.json: nothing of the code under test, and no graph."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from tests.every import one_of_many
from tests.published import deepseek_v3, qwen3_moe
from tests.synthetic import qwen3_shapes

every_layout = one_of_many("test-roofline")
EXPERT = re.compile(r"\.experts\.\d+\.")
WHOLE = re.compile(r"norm|\.gate\.|q_a_proj|kv_a_proj")
FLOAT32 = re.compile(r"\.gate\.")  # DeepSeek's router
ROUTED = ("num_experts", "n_routed_experts")
Config = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    weight_bytes: float
    kv_bytes: int
    operations: float


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    if config["model_type"] == "qwen3":
        return qwen3_shapes(config)
    published = {"qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}[config["model_type"]]
    return {name: shape for name, (_, shape) in published(config).items()}


def matrices(config: Config, tp: int, tokens: int) -> tuple[float, float]:
    """Elements a rank reads of what all tokens are multiplied by, as bytes; and multiplications for them."""
    experts = next((config[key] for key in ROUTED if key in config), 0)
    chosen = config.get("num_experts_per_tok", 0)
    reached = 1 - (1 - chosen / experts) ** tokens if experts else 0.0
    read = operations = 0.0
    for name, shape in shapes_of(config).items():
        size, part, item, share = math.prod(shape), tp, 2, 1.0
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            continue
        if WHOLE.search(name):
            part = 1
        elif ".k_proj." in name or ".v_proj." in name:
            part = min(tp, config["num_key_value_heads"])
        if config["model_type"] == "deepseek_v3" and FLOAT32.search(name):
            item = 4
        if EXPERT.search(name):
            share = reached
            operations += 2.0 * tokens * chosen / experts * size / part
        elif len(shape) == 2:
            operations += 2.0 * tokens * size / part
        read += item * size / part * share
    return read, operations


def ends(config: Config, tp: int, tokens: int, sequences: int) -> tuple[float, float]:
    """Bytes and multiplications of the embedding's rows, the head, and where a rank's parts begin."""
    hidden, vocab = config["hidden_size"], math.ceil(config["vocab_size"] / tp)
    return 2.0 * (tokens * hidden + vocab * hidden) + 4 * (tp > 1), 2.0 * sequences * vocab * hidden


def decode(config: Config, tp: int, ep: int, sequences: int, context: int) -> Expected:
    """A step of one new token of each sequence."""
    read, operations = matrices(config, tp, sequences)
    more, head = ends(config, tp, sequences, sequences)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"] // tp
    if config["model_type"] == "deepseek_v3":
        latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        row, attention = latent + rope, heads * (2 * latent + rope)
        cache = row
    else:
        of_keys = max(1, config["num_key_value_heads"] // tp) * config["head_dim"]
        row, attention, cache = 2 * of_keys, 2 * heads * config["head_dim"], 2 * of_keys
    kv = 2 * layers * sequences * (context * row + cache)
    operations += 2.0 * layers * sequences * context * attention
    return Expected(read + more + starts(config, ep), kv, operations + head)


def prefill(config: Config, tp: int, ep: int, tokens: int) -> Expected:
    """A prompt of one sequence, each token looking at those before it and at itself."""
    read, operations = matrices(config, tp, tokens)
    more, head = ends(config, tp, tokens, 1)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"] // tp
    if config["model_type"] == "deepseek_v3":
        width = max(config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"])
        cache = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        width = config["head_dim"]
        cache = 2 * max(1, config["num_key_value_heads"] // tp) * width
    pairs = tokens * (tokens + 1) // 2
    operations += 2.0 * 2 * layers * heads * width * pairs
    return Expected(read + more + starts(config, ep), 2 * layers * tokens * cache, operations + head)


def starts(config: Config, ep: int) -> int:
    """Where a rank's experts begin: read by each layer that has some."""
    if ep == 1:
        return 0
    return 4 * sum(1 for name in shapes_of(config) if re.search(r"layers\.\d+\.mlp\.gate\.weight", name))
