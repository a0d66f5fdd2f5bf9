"""vLLM's flags for an artifact: the KV pool that they ask for, and what must not contradict the artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..artifact import Artifact
from ..kv_pool import Pool, usual_pool
from ..serving.flags import number
from ..targets import Target
from .accepted import flag_problems
from .arguments import BLOCK, as_flags, pool_token_bytes, table

BLOCK_SIZE, BLOCKS, POOL_BYTES = "--block-size", "--num-gpu-blocks-override", "--kv-cache-memory-bytes"
NO_TOKENIZER = "--skip-tokenizer-init"
PAGES = "msconv_runtime.vllm.pages.ArtifactPages"
FIXED = ("--model", "--hf-overrides", "--load-format", "--dtype", "--tensor-parallel-size")  # by the artifact
LARGEST_BLOCK = 4096  # tokens
SET_ELSEWHERE = {
    "model": "model",
    "dtype": "dtype",
    "tensor-parallel-size": "tp",
    "max-model-len": "context",
    "max-num-seqs": "requests",
}


def given_pool(artifact: Artifact, target: Target, given: Mapping[str, str]) -> Pool:
    """The KV pool that the user's flags ask for; without one that says how large, 0 tokens."""
    usual, block = usual_pool(artifact, target), number(given, BLOCK_SIZE) or BLOCK
    tokens = number(given, BLOCKS) * block or number(given, POOL_BYTES) // pool_token_bytes(artifact, target)
    return Pool(block, tokens, usual.dtype)


def given_problems(artifact: Artifact, target: Target, given: Mapping[str, str]) -> list[str]:
    """All that is wrong with the user's flags, and with serving this target by vLLM."""
    if not target.device.is_host:
        return [
            f"graphs for {target.name}: vLLM serves artifacts on a CPU only.  Serve them with SGLang, the usual "
            f"engine; or `msconv compile {artifact.root} --target cpu` and --device cpu"
        ]
    return flag_problems(given) + _fixed(artifact, target, given) + _sizes(given)


def _fixed(artifact: Artifact, target: Target, given: Mapping[str, str]) -> list[str]:
    """The user's flags that say something else than the artifact."""
    needed, problems = as_flags(table(artifact, target)), []
    for name in FIXED:
        if name in given and not _same(given[name], needed[name]):
            other = ", or make another artifact with `msconv reshard`" if name == FIXED[-1] else ""
            problems.append(
                f"{name} {given[name][:80]}: this artifact is served with {name} {needed[name]}.  "
                f"Leave the flag out{other}"
            )
    return problems


def _same(given: str, needed: str) -> bool:
    if given == needed or not needed.startswith("{"):
        return given == needed
    try:
        return bool(json.loads(given) == json.loads(needed))
    except (ValueError, RecursionError):
        return False


def _sizes(given: Mapping[str, str]) -> list[str]:
    """Sizes that vLLM would read in another way than this module does, or that no pool can have."""
    problems = []
    for name in (BLOCK_SIZE, BLOCKS, POOL_BYTES):
        if name in given and not number(given, name):
            problems.append(f"{name} {given[name][:80]}: write a whole number above 0, in digits")
    if number(given, BLOCK_SIZE) > LARGEST_BLOCK:
        problems.append(f"{BLOCK_SIZE} {given[BLOCK_SIZE]}: at most {LARGEST_BLOCK} tokens are taken")
    return problems
