"""A target's proof as data: what was compared, phase by phase, and the heat map over layers and tensor groups.

A norm of the residual stream shows what the tensors before it did, and everything before those: errors add up
from layer to layer, unless each layer was given the reference's input.  Only what was measured has a number.
"""

from __future__ import annotations

from typing import Any

from msconv_runtime.artifact import Manifest
from msconv_runtime.artifact.consistency import DEVIATIONS, HALF, INT8
from msconv_runtime.claims import CLAIMED, is_checked_here

MAX_COLUMNS = 96  # of more layers, neighbours share a column that shows the larger error
DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the bound, the upper ends of the scale's steps


def verification(target: str, manifest: Manifest, layers: int) -> dict[str, Any]:
    """`state`: proven or unproven, with `why`; without a proof there is nothing but that."""
    proof = manifest.proof_for(target)
    if proof is None:
        why = "not verified on these bytes" if manifest.weights else "without weights there is nothing to compare"
        return {"target": target, "state": "unproven", "why": why, "heat": _heat({}, layers, None)}
    is_checked = is_checked_here(manifest, proof)
    errors = {k: float(v) for k, v in proof.settings.items() if isinstance(v, int | float)}
    half = {k.removeprefix(HALF): v for k, v in errors.items() if k.startswith(HALF)}
    return {
        "target": target,
        "state": "proven",
        "why": "all logits and their argmax agree within the bound"
        + (f", and {DEVIATIONS}, {errors[DEVIATIONS]:.1e}" if DEVIATIONS in errors else "")
        + ("" if is_checked else f": {CLAIMED}"),
        "checked_here": is_checked,
        "reference": proof.reference,
        "mode": proof.mode,
        "ranks": proof.ranks,
        "rows": proof.logits_compared,
        "bound": proof.bound,
        "max_abs_logit_error": proof.max_abs_logit_error,
        "share_of_bound": _share(proof.max_abs_logit_error, proof.bound),
        "argmax_agreement": proof.argmax_agreement,
        "phases": [
            {"phase": phase, "max_abs_logit_error": error, "share_of_bound": _share(error, proof.bound)}
            for phase, error in errors.items()
            if not phase.startswith((HALF, INT8)) and phase != DEVIATIONS
        ],
        "half_precision": half or None,
        "int8": {k.removeprefix(INT8): v for k, v in errors.items() if k.startswith(INT8)} or None,
        "heat": _heat(proof.norms, layers, proof.bound),
    }


def _share(error: float, bound: float) -> float:
    return float(f"{error / bound:.3g}") if bound else 0.0


def _heat(norms: dict[str, float], layers: int, bound: float | None) -> dict[str, Any]:
    """Columns are layers or, of many, neighbours; an error of None was not measured."""
    attention = [norms.get(f"model.layers.{i}.post_attention_layernorm") for i in range(layers)]
    after = [f"model.layers.{i}.input_layernorm" for i in range(1, layers)] + ["model.norm"]
    mlp = [norms.get(name) for name in after]
    width = max(1, -(-layers // MAX_COLUMNS)) if norms else layers
    columns = []
    for first in range(0, layers, width):
        last = min(layers, first + width) - 1
        columns.append(
            {
                "layers": str(first) if first == last else f"{first}..{last}",
                "attention": _cell(attention[first : last + 1], bound),
                "mlp": _cell(mlp[first : last + 1], bound),
            }
        )
    return {
        "measured": len(norms),
        "embedding": _cell([norms.get("model.layers.0.input_layernorm")], bound),
        "columns": columns,
        "scale": [{"level": i, "below": bound * decade} for i, decade in enumerate(DECADES)] if bound else [],
    }


def _cell(errors: list[float | None], bound: float | None) -> dict[str, Any] | None:
    """The largest error and its step on the scale.  None if one of them was not measured."""
    known = [e for e in errors if e is not None]
    if bound is None or len(known) < len(errors):
        return None
    worst = max(known)
    level = next((i for i, decade in enumerate(DECADES) if worst < bound * decade), len(DECADES))
    return {"error": worst, "level": level}
