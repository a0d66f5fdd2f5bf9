"""SGLang's flags for an artifact, and what the user's own must not contradict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ..artifact import Artifact, GraphInput, Parallel
from ..kv_pool import Pool, page_problem, usual_pool, widest_cache
from ..serving.flags import number
from ..serving.nodes import Nodes
from ..targets import Target
from .accepted import flag_problems
from .configuration import OVERRIDE, override_problems
from .speculation import hidden_problems, speculation_problems

ALIASES = {
    "--tp-size": ("--tp", "--tensor-parallel-size"),
    "--ep-size": ("--ep", "--expert-parallel-size"),
    "--model-path": ("--model",),
}
TOKENS, PAGE, DTYPE, KV_DTYPE = "--max-total-tokens", "--page-size", "--dtype", "--kv-cache-dtype"
NO_TOKENIZER = "--skip-tokenizer-init"
FIXED = ("--tp-size", "--ep-size", DTYPE, "--device")  # by the artifact
SET_ELSEWHERE = {
    "model-path": "model",
    "device": "devices.kind",
    "dtype": "dtype",
    "tp-size": "tp",
    "ep-size": "ep",
    "nnodes": "devices.nodes",
    "context-length": "context",
    "max-running-requests": "requests",
}


def name_flags(artifact: Artifact) -> dict[str, str]:
    """The model's own name for clients, not the directory; nothing where it is no plain name."""
    name = artifact.manifest.model.source.rpartition("/")[2]
    return {"--served-model-name": name} if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII) else {}


def device_flags(artifact: Artifact, target: Target) -> dict[str, str]:
    """For an NPU as SGLang's documentation of its MindSpore models has them; has not run on a device."""
    pool = usual_pool(artifact, target)
    flags = {
        "--device": target.kind,
        "--attention-backend": "torch_native" if target.device.is_host else "ascend",
        DTYPE: pool.dtype,
        PAGE: str(pool.page),
    }
    if target.device.is_host:
        flags |= {"--mem-fraction-static": "0.3", TOKENS: str(pool.tokens)}
    return flags


def parallel_flags(parallel: Parallel) -> dict[str, str]:
    """The layout the artifact was converted for.

    Without --sleep-on-idle every rank that waits for a request keeps a core busy.
    """
    experts = {"--ep-size": str(parallel.ep)} if parallel.ep > 1 else {}
    idle = {"--sleep-on-idle": ""} if parallel.tp > 1 else {}
    return {"--tp-size": str(parallel.tp), **experts, **idle}


def node_flags(nodes: Nodes) -> dict[str, str]:
    several = {"--nnodes": str(nodes.count), "--node-rank": str(nodes.rank)} if nodes.count > 1 else {}
    return several | ({"--dist-init-addr": nodes.address} if nodes.address else {})


def copies(given: Mapping[str, str]) -> int:
    """How many copies of the model --dp-size asks for."""
    return number(given, "--dp-size", "--dp", "--data-parallel-size") or 1


def given_pool(artifact: Artifact, target: Target, given: Mapping[str, str]) -> Pool:
    """The KV pool that the user's flags ask for; without one that says how many tokens, 0 of them."""
    usual = usual_pool(artifact, target)
    return replace(usual, page=number(given, PAGE) or usual.page, tokens=number(given, TOKENS))


def fixed_problems(artifact: Artifact, target: Target, given: Mapping[str, str]) -> list[str]:
    """The user's flags that say something else than the artifact."""
    needed = {**parallel_flags(artifact.manifest.parallel), **device_flags(artifact, target)}
    problems = []
    for name in FIXED:
        wanted = needed.get(name, "1")
        for spelled in {name, *ALIASES.get(name, ())} & given.keys():
            if given[spelled] != wanted:
                other = ", or make another artifact with `msconv reshard`" if name in ALIASES else ""
                problems.append(
                    f"{spelled} {given[spelled]}: this artifact is served with {name} {wanted}.  "
                    f"Leave the flag out{other}"
                )
    return problems


def pool_problems(target: Target, cache: GraphInput, page: int, kv_dtype: str = "auto") -> list[str]:
    """Why a target's graphs, which take `cache`, could not take a KV pool of such pages and elements."""
    problems = []
    if why := page_problem(target, cache, page):
        problems.append(f"{PAGE} {page}: {why}")
    return problems + type_problems(cache, kv_dtype)


def type_problems(cache: GraphInput, kv_dtype: str) -> list[str]:
    """Why graphs that take `cache` could not take a pool of elements of another type."""
    if kv_dtype in ("auto", cache.dtype) or (kv_dtype, cache.dtype) == ("bf16", "bfloat16"):
        return []
    return [f"{KV_DTYPE} {kv_dtype}: the graphs take a cache of {cache.dtype}"]


def given_problems(artifact: Artifact, target: Target, given: Mapping[str, str]) -> list[str]:
    """All that is wrong with the user's flags.  Graphs with a page of their own take any of SGLang's."""
    problems = flag_problems(given) + fixed_problems(artifact, target, given)
    problems += override_problems(artifact, given.get(OVERRIDE, ""))
    problems += speculation_problems(artifact, target, given) + hidden_problems(artifact, target, given)
    cache, kv_dtype = widest_cache(artifact, target), given.get(KV_DTYPE, "auto")
    page = given_pool(artifact, target, given).page if target.paging.slots is None else 0
    unfit = pool_problems(target, cache, page, kv_dtype) if page else type_problems(cache, kv_dtype)
    return problems + [f"{problem}.  Leave the flag out" for problem in unfit]
