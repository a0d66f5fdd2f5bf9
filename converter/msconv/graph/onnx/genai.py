"""genai_config.json: what onnxruntime-genai reads of a directory with an ONNX decoder in it."""

from __future__ import annotations

import json
from typing import Any

from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.files import read_file
from msconv_runtime.errors import ArtifactError
from msconv_runtime.targets import ONNX_FILE

from ...families.config import DecoderConfig
from .steps import cache_sizes

KIND = "qwen3"  # what genai calls a decoder that takes ids, mask and positions, and keeps keys and values
MOST_BYTES = 1 << 20


def genai_config(artifact: Artifact, config: DecoderConfig) -> bytes:
    """The file.  Ids of special tokens are those of generation_config.json, or else of config.json."""
    tokens = _special_tokens(artifact)
    (heads, width), _ = cache_sizes(config)
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    kept = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    model: dict[str, Any] = {
        "type": KIND,
        **tokens,
        "context_length": config.max_positions,
        "vocab_size": config.vocab,
        "decoder": {
            "session_options": {"provider_options": []},
            "filename": ONNX_FILE,
            "head_size": width,
            "hidden_size": config.hidden,
            "num_attention_heads": config.heads,
            "num_hidden_layers": config.layers,
            "num_key_value_heads": heads,
            "inputs": {n: n for n in ("input_ids", "attention_mask", "position_ids")} | names,
            "outputs": {"logits": "logits", **kept},
        },
    }
    search = {"max_length": config.max_positions, "do_sample": False, "past_present_share_buffer": False}
    return json.dumps({"model": model, "search": search}, indent=1).encode() + b"\n"


def _special_tokens(artifact: Artifact) -> dict[str, Any]:
    """Those that are named; where nothing ends an answer, genai stops at the length that it is given."""
    raw = _object(artifact, "config.json") | _object(artifact, "generation_config.json")
    ends = raw.get("eos_token_id")
    ends = [e for e in (ends if isinstance(ends, list) else [ends]) if type(e) is int]
    found: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    named = {name: raw[name] for name in ("bos_token_id", "pad_token_id") if type(raw.get(name)) is int}
    return found | ({"pad_token_id": ends[0]} if ends else {}) | named


def _object(artifact: Artifact, name: str) -> dict[str, Any]:
    """A JSON object of the artifact, {} if it has no such file.  Raises ArtifactError for what is none."""
    path = artifact.root / name
    try:
        found = json.loads(read_file(path, MOST_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ArtifactError(f"{path}: {e}.", "Convert again with --force.") from None
    return {k: v for k, v in found.items() if v is not None} if isinstance(found, dict) else {}
