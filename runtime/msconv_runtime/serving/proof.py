"""What a server can say of the artifact that it serves: which it is, and what has been proved of it."""

from __future__ import annotations

from typing import Any

from ..artifact import Artifact
from ..claims import is_checked_here
from ..kernels.variants import rounding_choice
from ..targets import device_of, target_named
from .ready import has_chat_template


def proof_of(artifact: Artifact, target: str) -> dict[str, Any]:
    """Model, layout, digests, and the proof and rehearsals that hold for exactly these digests.  No proof covers
    `rounding_kernels`, those that were asked for."""
    manifest = artifact.manifest
    proof, weights = manifest.proof_for(target), manifest.weights
    return {
        "model": manifest.model.source,
        "commit": manifest.model.commit,
        "parallel": {"tp": manifest.parallel.tp, "ep": manifest.parallel.ep},
        "tool": manifest.tool,
        "target": target,
        "weights": None if weights is None else {"dtype": weights.dtype, "digest": weights.digest},
        "graphs": [
            {"role": g.role, "variant": g.variant, "digest": g.digest, "mindspore": g.mindspore}
            for g in manifest.graphs_for(target)
        ],
        "proven": None
        if proof is None
        else {
            "reference": proof.reference,
            "mode": proof.mode,
            "bound": proof.bound,
            "max_abs_logit_error": proof.max_abs_logit_error,
            "argmax_agreement": proof.argmax_agreement,
            "logits_compared": proof.logits_compared,
            "checked_here": is_checked_here(manifest, proof),
        },
        "rounding_kernels": rounding_choice() if target_named(target).device.is_host else "",
        "rehearsed": [
            {"sglang": r.sglang, "mode": r.mode, "tokens": r.tokens, "max_logit_error": r.max_logit_error}
            for r in manifest.rehearsals_for(target)
        ],
        "chat_template": has_chat_template(artifact.root),
        "run_on_device": device_of(target).has_run,
    }
