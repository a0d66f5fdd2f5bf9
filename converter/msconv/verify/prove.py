"""Proving an artifact for a target and writing the result into its manifest."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msconv_runtime.integrity import check_artifact
from msconv_runtime.weights import required

from msconv_runtime.artifact import Graph, Manifest, Verified, read_manifest, write_manifest
from msconv_runtime.errors import VerificationFailed
from msconv_runtime.graphs import graphs_of
from msconv_runtime.native import library

from ..compile import configuration, mindspore_version, unused_names
from ..families import DecoderConfig
from ..stream.lock import exclusive
from .compare import DECODE_STEPS, Candidate, Comparison, compare, half_precision_bound
from .reference import Reference, source_of

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


def prove(root: Path, target: str, reference: str | Path | None, layers: int = 0) -> Proof:
    """Compare the artifact's graphs and bytes with transformers.  A failed proof removes an earlier one.

    Weights that do not stay in memory are read anew at each step: of those models few decode steps are compared.
    `layers` above 0 compares the first layers only, in bounded memory; that is no proof of the whole and is
    not recorded as one.  Half-precision targets are also run in their own precision, and that is reported.
    """
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
    layers = layers if layers < config.layers else 0
    model = Reference(source, manifest, layers)
    candidate = _candidate(root, manifest, target, layers)
    large = sum(f.size for f in required(root, manifest).files) > LARGE_BYTES
    steps = FEW_STEPS if large else DECODE_STEPS
    others = {"native": lambda: _native(root, manifest, target, layers)} if _has_native(graphs) else {}
    comparison = compare(candidate, model, config.vocab, config.max_positions, steps=steps, others=others)
    ok = comparison.ok and not missing and not unused
    half = _half_precision(root, manifest, target, model, config) if ok and not layers and not large else {}
    seconds = time.monotonic() - started
    proof = Proof(target, manifest.parallel.tp, comparison, missing, unused, seconds, layers, half)
    if layers:
        return proof
    weights = required(root, manifest)
    entry = Verified(
        target=target,
        weights_digest=weights.digest,
        graph_digests=sorted(g.digest for g in graphs),
        reference=f"transformers on {manifest.model.source}"
        + (f", weights rounded to {weights.dtype}" if weights.source_dtype != weights.dtype else ""),
        mode="float32",
        bound=comparison.bound,
        max_abs_logit_error=comparison.max_abs_logit_error,
        argmax_agreement=comparison.argmax_agreement,
        ranks=manifest.parallel.tp,
        logits_compared=comparison.rows,
        settings={**comparison.by_phase, **half},
        norms=comparison.probes,
    )
    _record(root, target, entry if proof.ok else None)
    return proof


def _half_precision(
    root: Path, manifest: Manifest, target: str, model: Reference, config: DecoderConfig
) -> dict[str, float]:
    """The same graphs with the target's own rounding, short: reported with a bound of its own, no gate.

    With experts there is no bound: half precision takes other ones.
    """
    if target == "cpu":
        return {}
    from .lockstep import Lockstep

    candidate = Lockstep(root, manifest, target, exact=False)
    result = compare(candidate, model, config.vocab, config.max_positions, bound=float("inf"), steps=FEW_STEPS)
    found = {
        "half_precision_max_abs_logit_error": result.max_abs_logit_error,
        "half_precision_argmax_agreement": result.argmax_agreement,
    }
    if config.moe is None:
        found["half_precision_bound"] = half_precision_bound(target, result.largest_logit, config.layers)
    return found


def _candidate(root: Path, manifest: Manifest, target: str, layers: int) -> Candidate:
    """One CPU rank runs for real, in MindSpore; several ranks, and Ascend's graphs, in the interpreter."""
    if target == "cpu" and manifest.parallel.tp == 1 and not layers:
        from msconv_runtime import Session

        return Session(root, target, native=False)
    from .lockstep import Lockstep

    return Lockstep(root, manifest, target, layers=layers)


def _has_native(graphs: list[Graph]) -> bool:
    return any(g.phase == "native" for g in graphs)


def _native(root: Path, manifest: Manifest, target: str, layers: int) -> Candidate:
    """The native graph: with its compiled kernels where one rank can run and this machine has them."""
    if manifest.parallel.tp == 1 and not layers and library().path is not None:
        from msconv_runtime import Session

        return Session(root, target)
    from .lockstep import Lockstep

    return Lockstep(root, manifest, target, layers=layers, native=True)


def _record(root: Path, target: str, entry: Verified | None) -> None:
    """Put the target's proof into the manifest, or take an earlier one out."""
    with exclusive(root):
        manifest = read_manifest(root)
        kept = [v for v in manifest.verified if v.target != target] + ([entry] if entry else [])
        changed = msgspec.structs.replace(manifest, verified=sorted(kept, key=lambda v: v.target))
        if changed != manifest:
            write_manifest(root, changed)


def _coverage(root: Path, manifest: Manifest, target: str) -> tuple[list[str], list[str]]:
    """Names that a graph wants and that are not stored; stored ones that not every graph reads."""
    stored = {t.name for t in required(root, manifest).tensors}
    used = [{p.name for p in g.parameters} for g in graphs_of(root, manifest, target)]
    return sorted(set.union(*used) - stored), unused_names(stored, set.intersection(*used))
