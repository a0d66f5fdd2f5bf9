"""What is proved against what: an artifact's graphs of one target and its bytes, against the source."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any, cast

import msgspec

from msconv_runtime.artifact import Artifact, Weights, digest_bytes
from msconv_runtime.errors import VerificationFailed
from msconv_runtime.roles import COMPILED, of_variant
from msconv_runtime.targets import Target

from ..checkpoint.reference import configuration
from ..families import DecoderConfig
from ..layout.coverage import own_names, unused_names, without_draft
from ..quant import formats_named
from .by_layer.driver import ByLayer, JudgeByLayer
from .by_layer.prover import cut
from .candidates import candidate_of, drafting_of, runs_here
from .compare import Further, compare
from .comparison import Comparison, half_precision_bound
from .drafting import compare_drafts
from .kept import NOTHING, Kept, code_digest, keeping
from .layers import judge_in_layers
from .lockstep import Lockstep
from .memory import held_bytes, limited
from .reference import Reference
from .result import Proof, record
from .scenario import DECODE_STEPS, Candidate, Lengths
from .stored import Untouched
from .telling import Tell

LARGE_BYTES = 2 << 30
FEW_STEPS = 2
VERSIONS = ("torch", "transformers", "safetensors", "numpy", "mindspore")


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
        return steps_of(self.artifact.weights.nbytes)

    @property
    def is_large(self) -> bool:
        return is_large(self.artifact.weights.nbytes)

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
        runs = module_that_runs(target)
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
        if comparison.ok:
            self.tell("rows and experts that no token took", 0, 1)
            comparison.fail(Untouched(artifact, model.weights, config).run(comparison.chosen, layers).place)
        proof = self._proof(comparison)
        if proof.ok and not layers and not self.is_large:
            self.tell("the target's own precision", 0, 1)
            proof = _with_half_precision(proof, artifact, target, model, config)
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
        rest = Untouched(artifact, model.weights, config).run({}, layers)
        if place := found.place or rest.place:
            if not layers:
                record(artifact.root, target, None)
            raise VerificationFailed(
                f"{artifact.root}: not proven for {target.name}: {place}.",
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
            proof = _with_half_precision(proof, artifact, target, model, config, is_int8=True)
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


def is_large(weights_bytes: int) -> bool:
    """Whether weights of so many bytes, of all ranks, are read anew at each pass: little else is run then."""
    return weights_bytes > LARGE_BYTES


def steps_of(weights_bytes: int) -> int:
    """Decode steps that are compared."""
    return FEW_STEPS if is_large(weights_bytes) else DECODE_STEPS


def is_int8(weights: Weights) -> bool:
    """Whether some of the matrices are multiplied in int8."""
    return any(f.rounds_input for f in formats_named(weights.quant))


def _with_half_precision(
    proof: Proof,
    artifact: Artifact,
    target: Target,
    model: Reference,
    config: DecoderConfig,
    is_int8: bool = False,
) -> Proof:
    """The same graphs with the target's own rounding, short: reported with a bound of its own, no gate but that
    logits are numbers.

    With experts there is no bound: half precision takes other ones.  Nor with int8: it takes other codes.
    """
    if target.dtype == "float32":
        return proof
    candidate = Lockstep(artifact, target.name, exact=False)
    result = compare(candidate, model, config.vocab, config.max_positions, bound=float("inf"), steps=FEW_STEPS)
    found = {
        "half_precision_max_abs_logit_error": result.max_abs_logit_error,
        "half_precision_argmax_agreement": result.argmax_agreement,
    }
    if config.moe is None and not is_int8:
        found["half_precision_bound"] = half_precision_bound(target, result.largest_logit, config.layers)
    overflow = "" if isfinite(result.max_abs_logit_error) else f"{result.worst} ({target.dtype})"
    return replace(proof, half_precision=found, overflow=overflow)


def module_that_runs(target: Target) -> Any:
    """The module that runs what the target's graphs are written as."""
    return import_module(f".{target.form.run}", __package__)


def _coverage(artifact: Artifact, target: Target) -> tuple[list[str], list[str]]:
    """Names that a graph reads and that are not stored; stored ones that no graph reads."""
    stored = {t.name for t in artifact.weights.tensors}
    if not target.draft_graphs:
        stored = set(without_draft(stored, configuration(artifact).layers))
    read = own_names(p.name for g in artifact.graphs(target.name) for p in g.reads)
    return sorted(read - stored), unused_names(stored, read)
