"""Proving an artifact for a target and writing the result into its manifest."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.integrity import refuse_damage
from msconv_runtime.errors import EnvironmentProblem, UsageError, VerificationFailed
from msconv_runtime.kernels.variants import CHOICE, rounding_choice
from msconv_runtime.roles import COMPILED, of_variant
from msconv_runtime.targets import Target, target_named

from ..checkpoint.reference import configuration
from ..graph.toolchain import require
from .by_layer.driver import ByLayer
from .memory import refuse_ceiling
from .reference import source_of
from .result import Proof, entry_of, record
from .subject import Subject, is_int8, module_that_runs
from .telling import Tell, quietly


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
    raises UsageError elsewhere.  Raises EnvironmentProblem where kernels that round are asked for.
    """
    started = time.monotonic()
    artifact = Artifact(root)
    config = configuration(artifact)
    artifact.graphs(target_name)
    target = target_named(target_name)
    _refuse_rounding(artifact, target)
    layers = layers if layers < config.layers else 0
    has_codes = is_int8(artifact.weights)
    if not has_codes and (max_kl is not None or text is not None):
        raise UsageError(
            f"{root}: is not quantised: there is no drift to measure.", "Leave --max-kl and --text out."
        )
    if max_memory is not None and (has_codes or config.drafts_for is not None):
        refuse_ceiling(root, max_memory)
    if by_layer is not None:
        _refuse_by_layer(artifact, target, layers, has_codes or config.drafts_for is not None)
        by_layer.gather(artifact, target_name)
    source = source_of(root, reference)
    require(target.form)
    tell("reading every byte", 0, 1)
    try:
        refuse_damage(artifact, VerificationFailed)
        module_that_runs(target).begin(artifact, target, layers)
    except VerificationFailed:
        record(root, target, None)
        raise
    subject = Subject(artifact, target, config, source, layers, tell, max_memory, by_layer)
    if config.drafts_for is not None:
        found = subject.draft()
    else:
        found = subject.led(max_kl, text) if has_codes else subject.resumable()
    size = artifact.weights.nbytes
    proof = replace(found, seconds=time.monotonic() - started, weights_bytes=size)
    if not layers:
        record(root, target, entry_of(artifact, proof) if proof.ok else None)
    return proof


def _refuse_rounding(artifact: Artifact, target: Target) -> None:
    """Raises EnvironmentProblem if the chosen kernels compute something else than is to be proved."""
    if (name := rounding_choice()) and of_variant(artifact.graphs(target.name), COMPILED):
        raise EnvironmentProblem(
            f"{CHOICE}={name}: these kernels round activations to bfloat16, and cannot be proved",
            f"unset {CHOICE}; what is proved with others can be served with these.",
        )


def _refuse_by_layer(artifact: Artifact, target: Target, layers: int, has_other_proof: bool) -> None:
    """Raises UsageError where layers are not proved each by itself."""
    reason = ""
    if has_other_proof:
        reason = "proofs of int8, and of a draft by itself, are made by one machine"
    elif layers:
        reason = "--layers compares the first layers on one machine"
    else:
        reason = module_that_runs(target).runs_as_a_whole(artifact, target)
    if reason:
        raise UsageError(f"{artifact.root}: --ray: {reason}.", "Leave --ray out.")
