"""Proofs as `msconv verify` would write them, of artifacts that nothing was proved of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msconv_runtime.artifact import Verified, read_manifest

LED = {"int8_codes_compared": 100000, "int8_codes_led": 1, "int8_codes_unexplained": 0}


def proof(root: Path, **changes: Any) -> Verified:
    """Of an artifact's CPU graphs, with settings of every kind."""
    manifest = read_manifest(root)
    assert manifest.weights is not None
    fields: dict[str, Any] = {
        "target": "cpu",
        "weights_digest": manifest.weights.digest,
        "graph_digests": sorted(g.digest for g in manifest.graphs),
        "reference": "transformers on untied",
        "mode": "float32",
        "bound": 1e-4,
        "max_abs_logit_error": 2e-6,
        "argmax_agreement": 1.0,
        "ranks": 1,
        "logits_compared": 80,
        "settings": {
            "prefill": 2e-6,
            "half_precision_max_abs_logit_error": 0.5,
            "half_precision_argmax_agreement": 0.9,
            **LED,
        },
        "norms": {"model.norm": 1e-6},
    }
    return Verified(**fields | changes)
