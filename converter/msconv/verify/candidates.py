"""Who runs a target's graphs in a proof: MindSpore where this machine can, else the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from msconv_runtime.artifact import Artifact
from msconv_runtime.kernels import library
from msconv_runtime.roles import COMPILED, of_draft, of_variant
from msconv_runtime.targets import Target

from .drafting import DraftCandidate, Drafting
from .reference import Reference
from .scenario import Candidate

if TYPE_CHECKING:
    from .lockstep import Lockstep


def begin(artifact: Artifact, target: Target, layers: int) -> None:
    """Nothing more is asked of MindIRs before they run."""


def most_positions(artifact: Artifact, target: Target) -> int | None:
    """Graphs take sequences of any length."""
    return None


def runs_as_a_whole(artifact: Artifact, target: Target) -> str:
    """Why layers are not run each by itself, or ""."""
    is_served = runs_here(artifact, target, 0, "")
    return (
        f"{target.name}'s graphs for one rank run in MindSpore as a whole, as they are served" if is_served else ""
    )


def candidates(artifact: Artifact, target: Target, layers: int) -> dict[str, Callable[[], Candidate]]:
    """By variant, "" first: graphs of compiled kernels, if there are any, are proved after those of MindSpore's
    operations."""
    found: dict[str, Callable[[], Candidate]] = {"": partial(candidate_of, artifact, target, layers)}
    if of_variant(artifact.graphs(target.name), COMPILED):
        found[COMPILED] = partial(candidate_of, artifact, target, layers, COMPILED)
    return found


def candidate_of(artifact: Artifact, target: Target, layers: int, variant: str = "") -> Candidate:
    """One CPU rank runs for real, in MindSpore, where it has what the variant needs; several ranks, and Ascend's
    graphs, in the interpreter."""
    if runs_here(artifact, target, layers, variant):
        from msconv_runtime import Session

        return Session(artifact.root, target.name, compiled=variant == COMPILED)
    from .lockstep import Lockstep

    return Lockstep(artifact, target.name, layers=layers, variant=variant)


def runs_here(artifact: Artifact, target: Target, layers: int, variant: str) -> bool:
    is_one = target.device.is_host and artifact.tp == 1 and not layers
    return is_one and (variant != COMPILED or library().path is not None)


def drafting_of(artifact: Artifact, target: Target, model: Reference) -> Drafting | None:
    """A draft's graphs and their reference, if the artifact has them."""
    variants = sorted({g.variant for g in of_draft(artifact.graphs(target.name))})

    def candidate(variant: str) -> DraftCandidate:
        if runs_here(artifact, target, 0, variant):
            from msconv_runtime import Session

            return Session(artifact.root, target.name, compiled=variant == COMPILED).draft
        return interpreted(variant)

    def interpreted(variant: str) -> Lockstep:
        from .lockstep import Lockstep

        return Lockstep(artifact, target.name, variant=variant, draft=True)

    draft = artifact.manifest.draft
    if not variants or draft is None:
        return None
    own = {v: partial(interpreted, v) for v in variants}
    return Drafting(
        import_module(f".{draft.kind}", __package__).build(model),
        {v: partial(candidate, v) for v in variants},
        own,
    )
