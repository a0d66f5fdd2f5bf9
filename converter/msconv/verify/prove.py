"""Proving an artifact for a target and writing the result into its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from msconv_runtime import claims
from msconv_runtime.artifact import Artifact, Verified
from msconv_runtime.artifact.integrity import refuse_damage
from msconv_runtime.errors import VerificationFailed
from msconv_runtime.kernels import library
from msconv_runtime.roles import COMPILED, of_variant
from msconv_runtime.targets import Target, target_named

from ..checkpoint.reference import configuration
from ..families import DecoderConfig
from ..graph.toolchain import mindspore_version
from ..layout.coverage import unused_names
from ..workspace.lock import exclusive
from .compare import Comparison, compare, half_precision_bound
from .reference import Reference, source_of
from .scenario import DECODE_STEPS, Candidate

LARGE_BYTES = 2 << 30
FEW_STEPS = 2


@dataclass(frozen=True)
class Proof:
    """The outcome.  `missing` and `unused` are tensor names: graph parameters against stored weights."""

    target: str
    ranks: int
    comparison: Comparison
    missing: list[str]
    unused: list[str]
    seconds: float
    layers: int = 0
    half_precision: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.comparison.ok and not self.missing and not self.unused


def prove(root: Path, target_name: str, reference: str | Path | None, layers: int = 0) -> Proof:
    """Compare the artifact's graphs and bytes with transformers.  A failed proof removes an earlier one.

    Weights that do not stay in memory are read anew at each step: of those models few decode steps are compared.
    `layers` above 0 compares the first layers only, in bounded memory; that is no proof of the whole and is
    not recorded as one.  Half-precision targets are also run in their own precision, and that is reported.
    """
    started = time.monotonic()
    artifact = Artifact(root)
    config = configuration(artifact)
    artifact.graphs(target_name)
    target = target_named(target_name)
    source = source_of(root, reference)
    mindspore_version()
    try:
        refuse_damage(artifact, VerificationFailed)
    except VerificationFailed:
        _record(root, target, None)
        raise
    missing, unused = _coverage(artifact, target)
    layers = layers if layers < config.layers else 0
    model = Reference(source, artifact.manifest, layers)
    is_large = sum(f.size for f in artifact.weights.files) > LARGE_BYTES
    comparison = compare(
        _candidate(artifact, target, layers),
        model,
        config.vocab,
        config.max_positions,
        steps=FEW_STEPS if is_large else DECODE_STEPS,
        others=_others(artifact, target, layers),
    )
    ok = comparison.ok and not missing and not unused
    half = _half_precision(artifact, target, model, config) if ok and not layers and not is_large else {}
    seconds = time.monotonic() - started
    proof = Proof(target.name, artifact.tp, comparison, missing, unused, seconds, layers, half)
    if not layers:
        _record(root, target, _entry(artifact, proof) if proof.ok else None)
    return proof


def _entry(artifact: Artifact, proof: Proof) -> Verified:
    """What the manifest keeps of a proof."""
    weights, comparison = artifact.weights, proof.comparison
    rounded = f", weights rounded to {weights.dtype}" if weights.source_dtype != weights.dtype else ""
    return Verified(
        target=proof.target,
        weights_digest=weights.digest,
        graph_digests=sorted(g.digest for g in artifact.graphs(proof.target)),
        reference=f"transformers on {artifact.manifest.model.source}{rounded}",
        mode="float32",
        bound=comparison.bound,
        max_abs_logit_error=comparison.max_abs_logit_error,
        argmax_agreement=comparison.argmax_agreement,
        ranks=artifact.tp,
        logits_compared=comparison.rows,
        settings={**comparison.by_phase, **proof.half_precision},
        norms=comparison.probes,
    )


def _half_precision(
    artifact: Artifact, target: Target, model: Reference, config: DecoderConfig
) -> dict[str, float]:
    """The same graphs with the target's own rounding, short: reported with a bound of its own, no gate.

    With experts there is no bound: half precision takes other ones.
    """
    if target.dtype == "float32":
        return {}
    from .lockstep import Lockstep

    candidate = Lockstep(artifact, target.name, exact=False)
    result = compare(candidate, model, config.vocab, config.max_positions, bound=float("inf"), steps=FEW_STEPS)
    found = {
        "half_precision_max_abs_logit_error": result.max_abs_logit_error,
        "half_precision_argmax_agreement": result.argmax_agreement,
    }
    if config.moe is None:
        found["half_precision_bound"] = half_precision_bound(target, result.largest_logit, config.layers)
    return found


def _candidate(artifact: Artifact, target: Target, layers: int, variant: str = "") -> Candidate:
    """One CPU rank runs for real, in MindSpore, where it has what the variant needs; several ranks, and Ascend's
    graphs, in the interpreter."""
    runs_here = target.device.is_host and artifact.tp == 1 and not layers
    if runs_here and (variant != COMPILED or library().path is not None):
        from msconv_runtime import Session

        return Session(artifact.root, target.name, compiled=variant == COMPILED)
    from .lockstep import Lockstep

    return Lockstep(artifact, target.name, layers=layers, variant=variant)


def _others(artifact: Artifact, target: Target, layers: int) -> dict[str, Callable[[], Candidate]]:
    """Graphs of compiled kernels, if there are any: proved after those of MindSpore's operations."""
    if not of_variant(artifact.graphs(target.name), COMPILED):
        return {}
    return {COMPILED: lambda: _candidate(artifact, target, layers, COMPILED)}


def _record(root: Path, target: Target, entry: Verified | None) -> None:
    """Put the target's proof into the manifest, or take an earlier one out."""
    with exclusive(root):
        artifact = Artifact(root)
        before = artifact.manifest.verified
        kept = [v for v in before if v.target != target.name] + ([entry] if entry else [])
        if sorted(kept, key=lambda v: v.target) != before:
            artifact.changed(verified=sorted(kept, key=lambda v: v.target))
        if entry:
            claims.note(entry)


def _coverage(artifact: Artifact, target: Target) -> tuple[list[str], list[str]]:
    """Names that a graph reads and that are not stored; stored ones that no graph reads."""
    stored = {t.name for t in artifact.weights.tensors}
    read = {p.name for g in artifact.graphs(target.name) for p in g.reads}
    return sorted(read - stored), unused_names(stored, read)
