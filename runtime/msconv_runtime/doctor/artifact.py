"""Whether an artifact fits this machine: its files, graphs, proofs and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..artifact import Artifact, Manifest
from ..claims import CLAIMED, is_checked_here
from ..draft_kinds import DRAFT_KINDS
from ..errors import MsconvError
from ..roles import can_serve, gives_all_logits, of_model, of_variant
from ..targets import ALL_DEVICES, DEVICES, TARGETS, device_of, usual_target
from ..versions import TRIED, in_series, named
from .findings import NPU, SERVE, Finding, State, served
from .machine import Machine
from .memory import memory_findings
from .packages import Needs

TOKENIZER = "tokenizer.json"
OTHERS = ("tiktoken", "tokenization", "vocab", "spiece")  # tokenizers of other kinds begin so
MAX_DAMAGE = 20  # files that are named


def artifact_findings(
    machine: Machine, root: Path, tokens: int, needs: Needs, drafts: Sequence[Artifact] = ()
) -> tuple[dict[str, Any], list[Finding]]:
    """The artifact in short, and how it fits this machine."""
    short: dict[str, Any] = {"path": str(root), "ready": False}
    try:
        artifact = Artifact(root)
        manifest = artifact.manifest
        short["ready"] = True
        damage = _damage(artifact)
        memory = list(memory_findings(machine, artifact, tokens, needs, drafts))
    except (MsconvError, OSError, ImportError) as e:
        hint = getattr(e, "hint", "") or "make it readable, and numpy importable"
        return short, [Finding("artifact", "wrong", str(e), "READY, and a manifest that fits", hint, SERVE)]
    weights, tp = manifest.weights, manifest.parallel.tp
    short |= {"format": manifest.format, "tp": tp, "ep": manifest.parallel.ep}
    short["rank_bytes"] = weights.rank_bytes if weights else None
    found = [Finding("artifact", "ok", f"format {manifest.format}, READY, tp {tp}, ep {manifest.parallel.ep}")]
    if weights is None:
        hint = f"`msconv convert --model <dir> --tp {tp} --output {root}`"
        found.append(Finding("weights", "missing", "none", "those of the model", hint, SERVE))
    found += _tokenizer(root, needs)
    for target in _targets(manifest):
        found += _graphs(machine, root, manifest, target, not damage)
    found += _ranks(machine, root, tp)
    proven = {f.name.removeprefix("proof "): f.state == "ok" for f in found if f.name.startswith("proof ")}
    return {**short, "proven": proven}, [*found, *damage, *memory]


def _tokenizer(root: Path, needs: Needs) -> Iterator[Finding]:
    """Servers take texts; without a tokenizer that they can read without running code, token ids only."""
    if not needs.no_tokenizer:
        return
    if (root / TOKENIZER).is_file():
        yield Finding("tokenizer", "ok", TOKENIZER)
        return
    others = sorted(p.name for p in root.glob("*") if p.name.startswith(OTHERS))
    found = f"{', '.join(others)}, no {TOKENIZER}" if others else f"no {TOKENIZER}"
    hint = (
        f"save the model's fast tokenizer (transformers: `save_pretrained`) as {TOKENIZER} beside the "
        f"checkpoint and convert again; or serve with `-- {needs.no_tokenizer}` and send token ids"
    )
    yield Finding("tokenizer", "missing", found, f"{TOKENIZER}, to take and give text", hint, SERVE)


def _targets(manifest: Manifest) -> Iterator[str]:
    """For each kind of device: the targets that the artifact has graphs for, or else one that it could have."""
    for kind in ALL_DEVICES:
        there = {g.target for g in manifest.graphs if device_of(g.target).kind == kind}
        yield from sorted(there) or ([usual_target(kind).name] if kind in DEVICES else [])


def _damage(artifact: Artifact) -> list[Finding]:
    """Sizes of all files and digests of the graphs; what is wrong with one target's graphs is that target's."""
    from ..artifact.integrity import check_graphs

    serves = {g.path: served(device_of(g.target).kind) for g in artifact.manifest.graphs}
    damage = check_graphs(artifact)
    stops = tuple(a for a in SERVE if any(a in serves.get(d.path, SERVE) for d in damage))
    hint = "copy the artifact again, or convert and compile again"
    needed = "as the manifest says"
    return [Finding("file", "wrong", f"{d.path}: {d.problem}", needed, hint, stops) for d in damage[:MAX_DAMAGE]]


def _graphs(machine: Machine, root: Path, manifest: Manifest, target: str, intact: bool) -> Iterator[Finding]:
    """Whether a target's graphs are there, of a version that was tried, and proven."""
    graphs, device = manifest.graphs_for(target), device_of(target)
    package = TARGETS[target].form.package
    made, tried = sorted({g.written_by[1] for g in graphs}), TRIED[package]
    have = ", ".join(g.name for g in graphs)
    here = machine.version(package)
    state: State = "ok" if here and in_series(here, tried) else "untested"
    if not can_serve(of_variant(graphs, "")):
        state = "missing"
    elif not all(in_series(version, tried) for version in made):
        state = "wrong"
    found = f"{have} of {package} {', '.join(made)}; {here or 'none'} is installed" if graphs else "none"
    needed = f"prefill and decode of {package} {named(tried, ' or ')}"
    hint = f"`msconv compile {root} --target {target}`"
    if graphs and not of_model(graphs):
        needed = "those of a model: this is a draft, and answers nobody by itself"
        algorithm = DRAFT_KINDS[manifest.model.family].algorithms[-1]
        hint = (
            f"`msconv serve TARGET -- --speculative-algorithm {algorithm} --speculative-draft-model-path {root}`"
        )
    yield Finding(f"graphs {target}", state, found, needed, hint, served(device.kind))
    if served(device.kind) and can_serve(of_variant(graphs, "")) and not gives_all_logits(graphs):
        needed = "for drafts (speculative decoding) and log probabilities of prompts"
        yield Finding(f"all logits {target}", "missing", "no graphs that give them", needed, hint)
    if graphs:
        proof = manifest.proof_for(target) if intact else None
        found = f"largest logit error {proof.max_abs_logit_error:.2e}" if proof else "UNPROVEN"
        checked = proof is not None and is_checked_here(manifest, proof)
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
