"""Proving an artifact for a target and writing the result into its manifest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from msconv_runtime.artifact import Manifest, Verified, read_manifest, write_manifest
from msconv_runtime.errors import VerificationFailed
from msconv_runtime.graphs import graphs_of
from msconv_runtime.integrity import check_artifact
from msconv_runtime.weights import required

from ..compile import configuration, mindspore_version, unused_names
from ..stream.lock import exclusive
from .compare import Candidate, Comparison, compare
from .reference import Reference, source_of


@dataclass(frozen=True)
class Proof:
    """The outcome.  `missing` and `unused` are tensor names: graph parameters against stored weights."""

    target: str
    ranks: int
    comparison: Comparison
    missing: list[str]
    unused: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        return self.comparison.ok and not self.missing and not self.unused


def prove(root: Path, target: str, reference: Path | None) -> Proof:
    """Compare the artifact's graphs and bytes with transformers.  A failed proof removes an earlier one."""
    started = time.monotonic()
    manifest = read_manifest(root)
    config = configuration(root, manifest)
    graphs = graphs_of(root, manifest, target)
    source = source_of(root, reference)
    mindspore_version()
    damage = check_artifact(root, manifest)
    if damage:
        _record(root, target, None)
        where = "\n".join(f"  {d.path}: {d.tensor or 'file'}: {d.problem}" for d in damage[:20])
        raise VerificationFailed(
            f"{root}: its bytes are not those the manifest describes:\n{where}",
            "Copy the artifact again, or convert again with --force.",
        )
    missing, unused = _coverage(root, manifest, target)
    model = Reference(source, manifest)
    comparison = compare(_candidate(root, manifest, target), model, config.vocab, config.max_positions)
    proof = Proof(target, manifest.parallel.tp, comparison, missing, unused, time.monotonic() - started)
    weights = required(root, manifest)
    entry = Verified(
        target=target,
        weights_digest=weights.digest,
        graph_digests=sorted(g.digest for g in graphs),
        reference=f"transformers on {manifest.model.source}"
        + (f", weights rounded to {model.rounded_to}" if model.rounded_to else ""),
        mode="float32",
        bound=comparison.bound,
        max_abs_logit_error=comparison.max_abs_logit_error,
        argmax_agreement=comparison.argmax_agreement,
        ranks=manifest.parallel.tp,
        logits_compared=comparison.rows,
        settings=dict(comparison.by_phase.items()),
    )
    _record(root, target, entry if proof.ok else None)
    return proof


def _candidate(root: Path, manifest: Manifest, target: str) -> Candidate:
    """One CPU rank runs for real, in MindSpore; several ranks, and Ascend's graphs, in the interpreter."""
    if target == "cpu" and manifest.parallel.tp == 1:
        from msconv_runtime import Session

        return Session(root, target)
    from .lockstep import Lockstep

    return Lockstep(root, manifest, target)


def _record(root: Path, target: str, entry: Verified | None) -> None:
    """Put the target's proof into the manifest, or take an earlier one out."""
    with exclusive(root):
        manifest = read_manifest(root)
        kept = [v for v in manifest.verified if v.target != target] + ([entry] if entry else [])
        changed = msgspec.structs.replace(manifest, verified=sorted(kept, key=lambda v: v.target))
        if changed != manifest:
            write_manifest(root, changed)


def _coverage(root: Path, manifest: Manifest, target: str) -> tuple[list[str], list[str]]:
    stored = {t.name for t in required(root, manifest).tensors}
    used = {p.name for g in graphs_of(root, manifest, target) for p in g.parameters}
    return sorted(used - stored), unused_names(stored, used)
