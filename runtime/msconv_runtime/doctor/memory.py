"""The memory that serving an artifact takes, against what is free."""

from __future__ import annotations

from collections.abc import Iterator

from ..artifact import Artifact
from ..kv_pool import POOL_TOKENS, token_bytes, usual_pool, weight_bytes
from ..roles import COMPILED, can_serve, of_variant
from ..targets import TARGETS
from .findings import Finding, State, gib, to_serve
from .machine import Machine
from .packages import Needs


def memory_findings(machine: Machine, artifact: Artifact, tokens: int, needs: Needs) -> Iterator[Finding]:
    """Free memory against all ranks on a CPU: weights as the graphs take them, and the KV cache."""
    root, manifest, tp = artifact.root, artifact.manifest, artifact.tp
    here = [
        t for t in TARGETS.values() if t.device.is_host and can_serve(of_variant(manifest.graphs_for(t.name), ""))
    ]
    if manifest.weights is None or not here:
        return
    target, free = here[0], machine.memory()
    graphs = artifact.manifest.graphs_for(target.name)
    compiled = {} if machine.no_kernels() else of_variant(graphs, COMPILED)
    used = list((compiled or of_variant(graphs, "")).values())
    weights, token = weight_bytes(used), token_bytes(used[0].caches)
    pools = (tokens or POOL_TOKENS[0], tokens or usual_pool(artifact, target).tokens)
    least, usual = (tp * (weights + count * token) for count in pools)
    state: State = "untested" if free is None or free < usual else "ok"
    given = f" -- {needs.tokens_flag} {pools[0]}" if needs.tokens_flag else ""
    hint = f"`msconv serve {root}{given}` takes {gib(least)}"
    if free is not None and free < least:
        state, hint = "wrong", f"end other programs, or serve where {gib(least)} are free"
        if tokens > POOL_TOKENS[0]:
            hint += f", or give a smaller {needs.tokens_flag}"
    needed = f"{gib(usual)}: weights and KV cache of {tp} ranks on {target.device.words}"
    yield Finding("memory to serve", state, gib(free), needed, hint, (to_serve(target.kind),))
