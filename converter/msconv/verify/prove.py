"""Proving an artifact for a target and writing the result into its manifest."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from msconv_runtime import claims
from msconv_runtime.artifact import Artifact, Verified, Weights, digest_bytes
from msconv_runtime.artifact.integrity import refuse_damage
from msconv_runtime.errors import UsageError, VerificationFailed
from msconv_runtime.roles import COMPILED, of_variant
from msconv_runtime.targets import Target, target_named

from ..checkpoint.reference import configuration
from ..families import DecoderConfig
from ..graph.toolchain import require
from ..layout.coverage import own_names, unused_names, without_draft
from ..quant import formats_named
from ..workspace.lock import exclusive
from .by_layer.driver import ByLayer, JudgeByLayer
from .by_layer.prover import cut
from .candidates import candidate_of, drafting_of, runs_here
from .compare import Comparison, Further, compare, half_precision_bound
from .drafting import compare_drafts
from .kept import NOTHING, Kept, code_digest, keeping
from .layers import judge_in_layers
from .lockstep import Lockstep
from .memory import held_bytes, limited, refuse_ceiling
from .reference import Reference, source_of
from .scenario import DECODE_STEPS, Candidate, Lengths
from .telling import Tell, quietly

if TYPE_CHECKING:
    from .int8.drift import Drift
    from .int8.run import Led

LED = "float32, led"  # as `mode`: codes are the candidate's where rounding is a tie
EACH_LAYER = "float32, each layer from the reference's input"  # as `mode`: errors do not add up
DEVIATIONS = "sum of the layers' own deviations"  # as a setting, where that is the mode
LARGE_BYTES = 2 << 30
FEW_STEPS = 2
VERSIONS = ("torch", "transformers", "safetensors", "numpy", "mindspore")


@dataclass(frozen=True)
class Proof:
    """The outcome.  `missing` and `unused` are tensor names: graph parameters against stored weights.

    Of int8 artifacts: `led`, what there was to say of codes; `drift` from the unquantised model, with the bound
    `max_kl` if somebody set one; `tensors`, how many were compared bit for bit.
    """

    target: str
    ranks: int
    comparison: Comparison
    missing: list[str]
    unused: list[str]
    seconds: float
    layers: int = 0
    half_precision: dict[str, float] = field(default_factory=dict)
    led: Led | None = None
    drift: Drift | None = None
    max_kl: float | None = None
    tensors: int = 0
    weights_bytes: int = 0
    is_resumed: bool = False

    @property
    def ok(self) -> bool:
        agrees = self.comparison.ok and (self.led is None or self.led.ok)
        return agrees and not self.missing and not self.unused and not self.is_adrift

    @property
    def seconds_per_gb(self) -> float | None:
        """Of the artifact's weights, 10^9 bytes; None if this run had not all to do, or looked at some layers."""
        if self.is_resumed or self.layers or not self.weights_bytes:
            return None
        return self.seconds / (self.weights_bytes / 1e9)

    @property
    def is_adrift(self) -> bool:
        return self.max_kl is not None and self.drift is not None and not self.drift.kl <= self.max_kl

    @property
    def int8(self) -> dict[str, str | int | float]:
        """What is said of a proof of int8, {} of another."""
        if self.led is None:
            return {}
        found = {"tensors_compared": self.tensors, **self.led.settings}
        found |= self.drift.settings if self.drift else {}
        return found | ({"drift_kl_bound": self.max_kl} if self.max_kl is not None else {})

    @property
    def place(self) -> str:
        """The first thing that is wrong."""
        return (self.led.place if self.led else "") or self.comparison.first


def is_int8(weights: Weights) -> bool:
    """Whether some of the matrices are multiplied in int8."""
    return any(f.rounds_input for f in formats_named(weights.quant))


def prove(
    root: Path,
    target_name: str,
    reference: str | Path | None,
    layers: int = 0,
    tell: Tell = quietly,
    max_kl: float | None = None,
    text: Path | None = None,
    max_memory: int | None = None,
    by_layer: ByLayer | None = None,
) -> Proof:
    """Compare the artifact's graphs and bytes with transformers.  A failed proof removes an earlier one.

    Weights that do not stay in memory are read anew at each step: of those models few decode steps are compared.
    `layers` above 0 compares the first layers only, in bounded memory; that is no proof of the whole and is
    not recorded as one.  Half-precision targets are also run in their own precision, and that is reported.
    Of int8 artifacts, how far they are from the unquantised model on `text` is measured, and must stay within
    `max_kl` if that is given.  `max_memory`: a ceiling in bytes; raises ResourceError if it cannot hold the least
    that is needed.  Of large models, what is done is kept for a run after this one if it is ended.  `tell`: hears
    of each phase how much of it is done.  `by_layer`: workers that prove layers each by itself, where that can be:
    raises UsageError elsewhere.
    """
    started = time.monotonic()
    artifact = Artifact(root)
    config = configuration(artifact)
    artifact.graphs(target_name)
    target = target_named(target_name)
    layers = layers if layers < config.layers else 0
    has_codes = is_int8(artifact.weights)
    if not has_codes and (max_kl is not None or text is not None):
        raise UsageError(
            f"{root}: is not quantised: there is no drift to measure.", "Leave --max-kl and --text out."
        )
    if max_memory is not None and (has_codes or config.eagle is not None):
        refuse_ceiling(root, max_memory)
    if by_layer is not None:
        _refuse_by_layer(artifact, target, layers, has_codes or config.eagle is not None)
        by_layer.gather(artifact, target_name)
    source = source_of(root, reference)
    require(target.form)
    tell("reading every byte", 0, 1)
    try:
        refuse_damage(artifact, VerificationFailed)
        _runs(target).begin(artifact, target, layers)
    except VerificationFailed:
        _record(root, target, None)
        raise
    subject = Subject(artifact, target, config, source, layers, tell, max_memory, by_layer)
    if config.eagle is not None:
        found = subject.draft()
    else:
        found = subject.led(max_kl, text) if has_codes else subject.resumable()
    size = sum(f.size for f in artifact.weights.files)
    proof = replace(found, seconds=time.monotonic() - started, weights_bytes=size)
    if not layers:
        _record(root, target, _entry(artifact, proof) if proof.ok else None)
    return proof


def _refuse_by_layer(artifact: Artifact, target: Target, layers: int, has_other_proof: bool) -> None:
    """Raises UsageError where layers are not proved each by itself."""
    reason = ""
    if has_other_proof:
        reason = "proofs of int8, and of a draft by itself, are made by one machine"
    elif layers:
        reason = "--layers compares the first layers on one machine"
    else:
        reason = _runs(target).runs_as_a_whole(artifact, target)
    if reason:
        raise UsageError(f"{artifact.root}: --ray: {reason}.", "Leave --ray out.")


@dataclass(frozen=True)
class Subject:
    """What is proved: an artifact's graphs of a target, against `source`; the first `layers` only, if not 0."""

    artifact: Artifact
    target: Target
    config: DecoderConfig
    source: Path
    layers: int
    tell: Tell
    max_memory: int | None = None
    by_layer: ByLayer | None = None

    @property
    def steps(self) -> int:
        return FEW_STEPS if self.is_large else DECODE_STEPS

    @property
    def is_large(self) -> bool:
        return sum(f.size for f in self.artifact.weights.files) > LARGE_BYTES

    @property
    def _tokens(self) -> int:
        """Of all sequences, at most."""
        return sum(Lengths.within(self.config.max_positions, self.steps, True).totals)

    def draft(self) -> Proof:
        """Against its own checkpoint, with a target that is drawn."""
        from .drafts import prove_draft

        self.tell("the draft in torch", 0, 1)
        return self._proof(prove_draft(self.artifact, self.target, self.config, self.source, self.tell))

    def resumable(self) -> Proof:
        """As `plain`; what is done of a large model is kept until it is whole."""
        if not self.is_large:
            return self.plain(NOTHING)
        with keeping(self.artifact.root, self.target.name, self._identity()) as kept:
            return replace(self.plain(kept), is_resumed=kept.is_old)

    def _identity(self) -> dict[str, Any]:
        """All that a result depends on."""
        artifact, manifest = self.artifact, msgspec.structs.replace(self.artifact.manifest, verified=[])
        files = {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(self.source.iterdir())}
        return {
            "weights": artifact.weights.digest,
            "graphs": sorted(g.digest for g in artifact.graphs(self.target.name)),
            "manifest": digest_bytes(msgspec.json.encode(manifest)),
            "source": [str(self.source.resolve()), files],
            "options": [self.layers, self.steps, self.by_layer is not None],
            "versions": [sys.version, *(version(p) for p in VERSIONS)],
            "code": code_digest(),
        }

    def plain(self, kept: Kept) -> Proof:
        """Against the source's own values."""
        artifact, target, config, layers = self.artifact, self.target, self.config, self.layers
        model = Reference(self.source, artifact.manifest, layers)
        model.tell, model.kept, model.keeps_streams = self.tell, kept, self.by_layer is not None
        runs = _runs(target)
        candidates: dict[str, Callable[[], Candidate]] = runs.candidates(artifact, target, layers)
        held = held_bytes(model, artifact, self._tokens, self.max_memory)
        candidates = {name: partial(limited, make, held) for name, make in candidates.items()}
        judge = judge_in_layers
        if self.by_layer is not None:
            for make in candidates.values():
                cut(cast(Lockstep, make()))  # before the reference takes its time
            judge = JudgeByLayer(self.by_layer, artifact, target.name, held)
        first = candidates.pop("")
        most = runs.most_positions(artifact, target) or config.max_positions
        comparison = compare(
            first(),
            model,
            config.vocab,
            min(most, config.max_positions),
            steps=self.steps,
            others=candidates,
            tell=self.tell,
            further=self._further(model),
            kept=kept,
            judge_apart=judge,
        )
        proof = self._proof(comparison)
        if proof.ok and not layers and not self.is_large:
            self.tell("the target's own precision", 0, 1)
            proof = replace(proof, half_precision=_half_precision(artifact, target, model, config))
        return proof

    def led(self, max_kl: float | None, text: Path | None) -> Proof:
        """Against int8 arithmetic, led where rounding is a tie.  Raises VerificationFailed if the artifact's codes
        are not the source's, or not those that it must have been quantised to."""
        from .int8 import drift, stored
        from .int8.reference import QuantisedReference
        from .int8.run import compare_led

        artifact, target, config, layers = self.artifact, self.target, self.config, self.layers
        model = QuantisedReference(self.source, artifact.manifest, layers)
        model.tell = self.tell
        self.tell("int8 tensors against the source's", 0, 1)
        found = stored.Check(artifact, model.weights).run(layers)
        if found.place:
            if not layers:
                _record(artifact.root, target, None)
            raise VerificationFailed(
                f"{artifact.root}: not proven for {target.name}: {found.place}.",
                "Check that --reference is what was converted; then convert again with --force.",
            )
        candidates = {"": lambda: self._interpreted("")}
        sessions = {}
        if of_variant(artifact.graphs(target.name), COMPILED):
            candidates[COMPILED] = lambda: self._interpreted(COMPILED)
        for variant in candidates:
            if runs_here(artifact, target, layers, variant):
                sessions[variant] = partial(candidate_of, artifact, target, layers, variant)
        comparison, led = compare_led(
            candidates,
            sessions,
            model,
            config.vocab,
            config.max_positions,
            steps=self.steps,
            tell=self.tell,
            drafting=None if layers else drafting_of(artifact, target, model),
        )
        proof = replace(self._proof(comparison), led=led, tensors=found.tensors, max_kl=max_kl)
        if not proof.ok or layers:
            return proof
        if not self.is_large:
            self.tell("the target's own precision", 0, 1)
            proof = replace(proof, half_precision=_half_precision(artifact, target, model, config, is_int8=True))
        self.tell("drift", 0, 1)
        measured = drift.measure(self.source, artifact.manifest, model, text, config.vocab, config.max_positions)
        return replace(proof, drift=measured)

    def _further(self, model: Reference) -> Further | None:
        """The comparison of the draft's graphs, if the artifact has them."""
        drafting = None if self.layers else drafting_of(self.artifact, self.target, model)
        return partial(compare_drafts, drafting=drafting, tell=self.tell) if drafting else None

    def _interpreted(self, variant: str) -> Lockstep:
        return Lockstep(self.artifact, self.target.name, layers=self.layers, variant=variant)

    def _proof(self, comparison: Comparison) -> Proof:
        missing, unused = _coverage(self.artifact, self.target)
        return Proof(self.target.name, self.artifact.tp, comparison, missing, unused, 0.0, self.layers)


def _entry(artifact: Artifact, proof: Proof) -> Verified:
    """What the manifest keeps of a proof."""
    weights, comparison, drift = artifact.weights, proof.comparison, proof.drift
    int8 = {f"int8_{name}": n for name, n in proof.int8.items() if not isinstance(n, str)}
    own = {DEVIATIONS: comparison.deviation_sum} if comparison.own_errors else {}
    rounded = f", weights rounded to {weights.dtype}" if weights.source_dtype != weights.dtype else ""
    return Verified(
        target=proof.target,
        weights_digest=weights.digest,
        graph_digests=sorted(g.digest for g in artifact.graphs(proof.target)),
        reference=f"transformers on {artifact.manifest.model.source}{rounded}"
        + (f"; {drift.words}" if drift else ""),
        mode=LED if proof.led else EACH_LAYER if comparison.own_errors else "float32",
        bound=comparison.bound,
        max_abs_logit_error=comparison.max_abs_logit_error,
        argmax_agreement=comparison.argmax_agreement,
        ranks=artifact.tp,
        logits_compared=comparison.rows,
        settings={**comparison.by_phase, **proof.half_precision, **int8, **own},
        norms=comparison.probes,
    )


def _half_precision(
    artifact: Artifact, target: Target, model: Reference, config: DecoderConfig, is_int8: bool = False
) -> dict[str, float]:
    """The same graphs with the target's own rounding, short: reported with a bound of its own, no gate.

    With experts there is no bound: half precision takes other ones.  Nor with int8: it takes other codes.
    """
    if target.dtype == "float32":
        return {}
    candidate = Lockstep(artifact, target.name, exact=False)
    result = compare(candidate, model, config.vocab, config.max_positions, bound=float("inf"), steps=FEW_STEPS)
    found = {
        "half_precision_max_abs_logit_error": result.max_abs_logit_error,
        "half_precision_argmax_agreement": result.argmax_agreement,
    }
    if config.moe is None and not is_int8:
        found["half_precision_bound"] = half_precision_bound(target, result.largest_logit, config.layers)
    return found


def _runs(target: Target) -> Any:
    """The module that runs what the target's graphs are written as."""
    return import_module(f".{target.form.run}", __package__)


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
    if not target.draft_graphs:
        stored = set(without_draft(stored, configuration(artifact).layers))
    read = own_names(p.name for g in artifact.graphs(target.name) for p in g.reads)
    return sorted(read - stored), unused_names(stored, read)
