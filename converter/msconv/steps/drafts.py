"""A draft that is another model: what it reads of an artifact's."""

from __future__ import annotations

from pathlib import Path

from msconv_runtime.artifact import Artifact, Draft, is_artifact
from msconv_runtime.draft_kinds import TITLES
from msconv_runtime.errors import UsageError

from ..checkpoint.hubs import Hub
from ..checkpoint.reference import configuration
from ..families import DecoderConfig
from ..location import open_reference
from ..workspace.lock import exclusive


def expect_draft(root: Path, reference: str, hub: Hub) -> list[str]:
    """Note that the artifact's graphs shall give what the draft reads, and take away those that do not.  Returns
    the targets that it had graphs for.  `reference`: a draft's artifact, directory or repository.  Raises
    UsageError for one that was made for another model."""
    if is_artifact(reference):
        draft = configuration(Artifact(reference))
    else:
        draft = open_reference(reference, hub, weights=False).open_configuration().config
    with exclusive(root):
        artifact = Artifact(root)
        wanted = _wanted(reference, draft, configuration(artifact))
        found = artifact.manifest.draft
        if found is not None and found.is_layer:
            raise UsageError(
                f"{root}: drafts by itself, and its graphs give what its own layer reads.",
                "Convert the model with --no-drafts for another draft, or leave --draft out.",
            )
        targets = artifact.targets
        if found != wanted:
            artifact.changed(draft=wanted, graphs=[])
    return targets


def _wanted(reference: str, draft: DecoderConfig, model: DecoderConfig) -> Draft:
    target = draft.drafts_for
    if target is None:
        raise UsageError(
            f"--draft {reference}: is a model by itself, and no draft of {TITLES}.",
            "It drafts as it is: serve with --speculative-algorithm STANDALONE.",
        )
    if model.drafts_for is not None:
        raise UsageError(f"--draft {reference}: the artifact is a draft itself.", "Give its target's artifact.")
    sizes = {
        "vocabulary": (target.vocab, model.vocab),
        "hidden size": (draft.hidden, model.hidden),
    }
    if wrong := [f"a {what} of {its}, not of {ours}" for what, (its, ours) in sizes.items() if its != ours]:
        raise UsageError(
            f"--draft {reference}: is made for another model: it has {' and '.join(wrong)}.",
            "Give a draft that was trained for this model.",
        )
    layers = target.kind.captured(model.layers, target.layers)
    if len(layers) != target.captured or not all(0 <= layer < model.layers for layer in layers):
        raise UsageError(
            f"--draft {reference}: reads {target.captured} layers, {layers} of a model of {model.layers}.",
            "Give a draft that was trained for this model.",
        )
    return Draft(target.kind.name, layers)
