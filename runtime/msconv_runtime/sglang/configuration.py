"""The model's configuration that SGLang serves with, against the one that the artifact's graphs were made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..artifact import Artifact
from ..errors import ArtifactError

OVERRIDE = "--json-model-override-args"
HARMLESS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "initializer_range",
)
ABSENT = "absent"
COMPUTED = [  # keys that transformers reads as they are written, and that every graph obeys
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "moe_intermediate_size",
    "num_experts",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "norm_topk_prob",
    "first_k_dense_replace",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
]
ROPE = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast")
HINT = "The graphs compute what the artifact's config.json says: convert a checkpoint with the other values."


def override_problems(artifact: Artifact, text: str) -> list[str]:
    """What an override says otherwise than the artifact, each key with both values."""
    try:
        asked = json.loads(text or "{}")
    except (ValueError, RecursionError) as e:
        return [f"{OVERRIDE}: not JSON: {e}"]
    if not isinstance(asked, dict):
        return [f"{OVERRIDE}: an object is needed"]
    found = differences(json.loads(artifact.config_bytes()), asked)
    return [f"{OVERRIDE}: {difference}.  {HINT}" for difference in found]


def differences(config: Mapping[str, Any], asked: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """`key is 1, here 2` for all that `asked` says otherwise than `config`.  Objects are compared key by key, as
    SGLang merges them."""
    for key, value in asked.items():
        has = config.get(key, ABSENT)
        if not where and key in HARMLESS:
            continue
        if isinstance(value, dict) and value:
            yield from differences(has if isinstance(has, dict) else {}, value, f"{where}{key}.")
        elif type(value) is bool or type(has) is bool:
            if value is not has:
                yield _told(f"{where}{key}", has, value)
        elif value != has:
            yield _told(f"{where}{key}", has, value)


def refuse_other(artifact: Artifact, resolved: Any, override: Mapping[str, Any] | None) -> None:
    """Raises ArtifactError unless SGLang's `resolved` configuration is that of the artifact."""
    config = json.loads(artifact.config_bytes())
    found = list(differences(config, override or {}))
    read = {key: getattr(resolved, key) for key in COMPUTED if hasattr(resolved, key)}
    found += differences(config, {key: value for key, value in read.items() if config.get(key) is not None})
    spelled = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope = getattr(resolved, "rope_parameters", None) or {}
    found += differences(spelled, {key: rope.get(key) for key in ROPE if spelled.get(key) is not None}, "rope.")
    if not spelled and rope.get("rope_type", "default") != "default":
        found.append(_told("rope_type", "default", rope["rope_type"]))
    if found:
        lines = "\n".join(f"  {line}." for line in dict.fromkeys(found))
        raise ArtifactError(f"{artifact.root}: SGLang has another configuration of the model:\n{lines}", HINT)


def _told(key: str, has: Any, asked: Any) -> str:
    return f"{key} is {_short(has)} in the artifact, not {_short(asked)}"


def _short(value: Any) -> str:
    text = value if value is ABSENT else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
