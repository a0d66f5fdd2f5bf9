"""What a proof of int8 says: codes that the reference took from the candidate, by layer, and how far the answers
are from those of the unquantised model.  Names of settings are those that `verify` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msconv_runtime.artifact import Verified
from msconv_runtime.artifact.consistency import INT8, MOST_LED

from .verification import DECADES, MAX_COLUMNS

LED_SHARE = "led_share "  # and then model.layers.N.self_attn or .mlp
PARTS = {"attention": "self_attn", "mlp": "mlp"}

Data = dict[str, Any]


def int8_proof(target: str, proof: Verified | None, layers: int) -> Data | None:
    """`codes`, `drift` (None if it was not measured) and the heat map of led codes.  None: nothing was proved of
    int8."""
    found = {
        name.removeprefix(INT8): float(n)
        for name, n in (proof.settings if proof else {}).items()
        if name.startswith(INT8) and not isinstance(n, str)
    }
    if not found.get("codes_compared"):
        return None
    compared, led = int(found["codes_compared"]), int(found.get("codes_led", 0))
    return {
        "target": target,
        "codes": {
            "compared": compared,
            "led": led,
            "share": float(f"{led / compared:.3g}"),
            "most": MOST_LED,
            "unexplained": int(found.get("codes_unexplained", 0)),
        },
        "drift": _drift(found),
        "heat": _heat(found, layers),
    }


def _drift(found: Mapping[str, float]) -> Data | None:
    if "drift_kl" not in found:
        return None
    names = ("kl", "kl_bound", "argmax_agreement", "perplexity", "perplexity_unquantised")
    return {name: found.get(f"drift_{name}") for name in names}


def _heat(found: Mapping[str, float], layers: int) -> Data:
    """Shares of led codes; of many layers, neighbours share a column that shows the larger."""
    width = max(1, -(-layers // MAX_COLUMNS))
    columns = []
    for first in range(0, layers, width):
        last = min(layers, first + width) - 1
        names = {
            part: [f"{LED_SHARE}model.layers.{i}.{module}" for i in range(first, last + 1)]
            for part, module in PARTS.items()
        }
        columns.append(
            {
                "layers": str(first) if first == last else f"{first}..{last}",
                **{part: _cell([found.get(name) for name in wanted]) for part, wanted in names.items()},
            }
        )
    return {
        "columns": columns,
        "scale": [{"level": i, "below": MOST_LED * decade} for i, decade in enumerate(DECADES)],
    }


def _cell(shares: list[float | None]) -> Data | None:
    """The largest share and its step on the scale.  None if there are no codes."""
    known = [share for share in shares if share is not None]
    if not known:
        return None
    worst = max(known)
    level = next((i for i, decade in enumerate(DECADES) if worst < MOST_LED * decade), len(DECADES))
    return {"error": worst, "level": level}
