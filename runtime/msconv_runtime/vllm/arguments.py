"""What vLLM is told to serve an artifact: one table, of which flags and Python arguments are made.

Imports nothing of vLLM.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..kv_pool import token_bytes, usual_pool
from ..roles import of_model
from ..targets import CPU, Target

ARCHITECTURE = "MsconvForCausalLM"  # the name under which the plug-in registers the slot
LOAD_FORMAT = "msconv"
BLOCK = 16  # tokens; vLLM shares prompts block by block
OVERRIDES: dict[str, Any] = {"architectures": [ARCHITECTURE], "quantization_config": None}


def arguments(root: str | Path) -> dict[str, Any]:
    """Arguments of vLLM's offline `LLM` for an artifact: `LLM(**arguments("artifacts/Qwen3-0.6B-tp1"))`."""
    return table(Artifact(Path(root)), CPU)


def table(artifact: Artifact, target: Target) -> dict[str, Any]:
    """Arguments by vLLM's names.  The KV pool has the tokens of `usual_pool`, and one block that vLLM keeps."""
    tokens = usual_pool(artifact, target).tokens
    return {
        "model": str(artifact.root),
        "hf_overrides": OVERRIDES,
        "load_format": LOAD_FORMAT,
        "dtype": target.dtype,
        "tensor_parallel_size": artifact.tp,
        "enforce_eager": True,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": (tokens + BLOCK) * pool_token_bytes(artifact, target),
        "max_model_len": -1,  # as much as the pool holds, at most what config.json says
        **_name(artifact),
    }


def pool_token_bytes(artifact: Artifact, target: Target) -> int:
    """Bytes of one token in the KV pool of one rank."""
    graphs = artifact.graphs(target.name)
    return token_bytes((of_model(graphs) or graphs)[0].caches)


def as_flags(values: dict[str, Any]) -> dict[str, str]:
    """The same as flags of a command line; "" for one that takes no value."""
    return {f"--{name.replace('_', '-')}": _word(value) for name, value in values.items()}


def _word(value: Any) -> str:
    if value is True:
        return ""
    return json.dumps(value) if isinstance(value, dict) else "auto" if value == -1 else str(value)


def _name(artifact: Artifact) -> dict[str, str]:
    """The model's own name for clients, not the directory; nothing where it is no plain name."""
    name = artifact.manifest.model.source.rpartition("/")[2]
    return {"served_model_name": name} if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII) else {}
