"""Whether an artifact fits this machine: its files, graphs, proofs, ranks, and the memory that serving takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..artifact import Artifact, Manifest
from ..claims import CLAIMED, is_checked_here
from ..errors import MsconvError
from ..kv_pool import POOL_TOKENS, token_bytes, usual_pool, weight_bytes
from ..roles import COMPILED, can_serve, of_variant
from ..targets import DEVICES, TARGETS, device_of
from .findings import NPU, SERVE, Finding, State, gib, to_serve
from .machine import Machine, in_series
from .packages import PACKAGES, Needs

MAX_DAMAGE = 20  # files that are named


def artifact_findings(
    machine: Machine, root: Path, tokens: int, needs: Needs
) -> tuple[dict[str, Any], list[Finding]]:
    """The artifact in short, and how it fits this machine."""
    short: dict[str, Any] = {"path": str(root), "ready": False}
    try:
        artifact = Artifact(root)
        manifest = artifact.manifest
        short["ready"] = True
        damage = _damage(artifact)
        memory = list(_memory(machine, artifact, tokens, needs))
    except (MsconvError, OSError, ImportError) as e:
        hint = getattr(e, "hint", "") or "make it readable, and numpy importable"
        return short, [Finding("artifact", "wrong", str(e), "READY, and a manifest that fits", hint, SERVE)]
    weights, tp = manifest.weights, manifest.parallel.tp
    short |= {"format": manifest.format, "tp": tp, "ep": manifest.parallel.ep}
    short["rank_bytes"] = sum(f.size for f in weights.files if f.rank == 0) if weights else None
    found = [Finding("artifact", "ok", f"format {manifest.format}, READY, tp {tp}, ep {manifest.parallel.ep}")]
    if weights is None:
        hint = f"`msconv convert --model <dir> --tp {tp} --output {root}`"
        found.append(Finding("weights", "missing", "none", "those of the model", hint, SERVE))
    for target in _targets(manifest):
        found += _graphs(machine, root, manifest, target, not damage)
    found += _ranks(machine, root, tp)
    proven = {f.name.removeprefix("proof "): f.state == "ok" for f in found if f.name.startswith("proof ")}
    return {**short, "proven": proven}, [*found, *damage, *memory]


def _targets(manifest: Manifest) -> Iterator[str]:
    """For each kind of device: the targets that the artifact has graphs for, or else one that it could have."""
    for kind in DEVICES:
        usual = next(name for name, target in TARGETS.items() if target.kind == kind)
        yield from sorted({g.target for g in manifest.graphs if device_of(g.target).kind == kind}) or [usual]


def _damage(artifact: Artifact) -> list[Finding]:
    """Sizes of all files and digests of the graphs; what is wrong with one target's graphs is that target's."""
    from ..artifact.integrity import check_graphs

    serves = {g.path: to_serve(device_of(g.target).kind) for g in artifact.manifest.graphs}
    damage = check_graphs(artifact)
    stops = tuple(a for a in SERVE if any(serves.get(d.path, a) == a for d in damage))
    hint = "copy the artifact again, or convert and compile again"
    needed = "as the manifest says"
    return [Finding("file", "wrong", f"{d.path}: {d.problem}", needed, hint, stops) for d in damage[:MAX_DAMAGE]]


def _graphs(machine: Machine, root: Path, manifest: Manifest, target: str, intact: bool) -> Iterator[Finding]:
    """Whether a target's graphs are there, of a MindSpore that was tried, and proven."""
    graphs, device = manifest.graphs_for(target), device_of(target)
    made = sorted({g.mindspore for g in graphs})
    have = ", ".join(g.name for g in graphs)
    here = machine.version("mindspore")
    tested = PACKAGES["mindspore"].tested
    state: State = "ok" if here and in_series(here, tested) else "untested"
    if not can_serve(of_variant(graphs, "")):
        state = "missing"
    elif not all(in_series(version, tested) for version in made):
        state = "wrong"
    found = f"{have} of mindspore {', '.join(made)}; {here or 'none'} is installed" if graphs else "none"
    needed = f"prefill and decode of mindspore {' or '.join(t + '.x' for t in tested)}"
    hint = f"`msconv compile {root} --target {target}`"
    yield Finding(f"graphs {target}", state, found, needed, hint, (to_serve(device.kind),))
    if graphs:
        proof = manifest.proof_for(target) if intact else None
        found = f"largest logit error {proof.max_abs_logit_error:.2e}" if proof else "UNPROVEN"
        checked = proof is not None and is_checked_here(proof)
        found += f" ({CLAIMED}, not checked here)" * (proof is not None and not checked)
        if not device.has_run:
            found += ", interpreted" * bool(proof) + "; has run on no device"
        hint = f"`msconv verify {root} --target {target}`"
        yield Finding(f"proof {target}", "ok" if checked else "untested", found, "a proof of these bytes", hint)


def _ranks(machine: Machine, root: Path, tp: int) -> Iterator[Finding]:
    """Too few processors or devices for the artifact's ranks."""
    there, visible = machine.devices()
    usable = there if visible is None else len(visible)
    hint = f"`msconv reshard {root} --tp N --output DIR`"
    if tp > machine.cores:
        needed = "one a rank, else it is slow"
        yield Finding("ranks on cores", "untested", f"{tp} on {machine.cores}", needed, hint)
    if 0 < usable < tp:
        yield Finding("ranks on devices", "wrong", f"{tp} on {usable}", "one a rank", hint, NPU)


def _memory(machine: Machine, artifact: Artifact, tokens: int, needs: Needs) -> Iterator[Finding]:
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
