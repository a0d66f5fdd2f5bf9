"""The configuration of the model that an artifact holds."""

from __future__ import annotations

from dataclasses import replace

from msconv_runtime.artifact import Artifact

from ..families import DecoderConfig, configure
from ..quant import formats_named
from .headers import parse_json


def configuration(artifact: Artifact) -> DecoderConfig:
    """The model's configuration, from the artifact's own config.json.  Raises ArtifactError if it changed."""
    where = str(artifact.root / "config.json")
    raw = parse_json(artifact.config_bytes(), where)
    assert isinstance(raw, dict)
    config = configure(raw, where, artifact.manifest.model.harmless)[1]
    weights = artifact.manifest.weights
    kept = formats_named(weights.quant) if weights else ()
    draft = artifact.manifest.draft
    config = config.with_draft() if draft and draft.is_layer else config
    return replace(config, formats=(*config.formats, *kept))
