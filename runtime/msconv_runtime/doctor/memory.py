"""The memory that serving an artifact takes, against what is free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..artifact import Artifact
from ..kv_pool import POOL_TOKENS, token_bytes, usual_pool, weight_bytes
from ..roles import COMPILED, can_serve, of_model, of_variant
from ..targets import TARGETS
from .findings import Finding, State, gib, to_serve
from .machine import Machine
from .packages import Needs


def memory_findings(
    machine: Machine, artifact: Artifact, tokens: int, needs: Needs, drafts: Iterable[Artifact] = ()
) -> Iterator[Finding]:
    """Free memory against all ranks on a CPU: weights as the graphs take them, and the KV cache; those of `drafts`
    too, whose caches have as many tokens."""
    root, manifest, tp = artifact.root, artifact.manifest, artifact.tp
    here = [
        t for t in TARGETS.values() if t.device.is_host and can_serve(of_variant(manifest.graphs_for(t.name), ""))
    ]
    if manifest.weights is None or not here:
        return
    target, free = here[0], machine.memory()
    variant = "" if machine.no_kernels() else COMPILED
    sizes = [_rank_bytes(a, target.name, variant) for a in (artifact, *drafts)]
    weights, token = (sum(values) for values in zip(*sizes, strict=True))
    pools = (tokens or POOL_TOKENS[0], tokens or usual_pool(artifact, target).tokens)
    least, usual = (tp * (weights + count * token) for count in pools)
    state: State = "untested" if free is None or free < usual else "ok"
    given = f" -- {needs.tokens_flag} {pools[0]}" if needs.tokens_flag else ""
    hint = f"`msconv serve {root}{given}` takes {gib(least)}"
    if free is not None and free < least:
        state, hint = "wrong", f"end other programs, or serve where {gib(least)} are free"
        if tokens > POOL_TOKENS[0] and needs.tokens_flag:
            hint += f", or give a smaller {needs.tokens_flag}"
    what = "weights and KV cache" if len(sizes) == 1 else "weights and KV caches, with those of the draft,"
    needed = f"{gib(usual)}: {what} of {tp} ranks on {target.device.words}"
    yield Finding("memory to serve", state, gib(free), needed, hint, (to_serve(target.kind),))


def _rank_bytes(artifact: Artifact, target: str, variant: str) -> tuple[int, int]:
    """Of one rank: the weights that the graphs read, and one token in the caches.  Those without kernels, where
    there are none of the variant."""
    graphs = artifact.manifest.graphs_for(target)
    used = list((of_variant(graphs, variant) or of_variant(graphs, "")).values())
    return (weight_bytes(used), token_bytes((of_model(used) or used)[0].caches)) if used else (0, 0)
