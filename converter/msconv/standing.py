"""How far a target's graphs have come, in three words that are used the same way everywhere.

Interpreted: the graphs were executed on a CPU by msconv's interpreter and agree with transformers (`verify`).
Rehearsed: SGLang's server ran them on the stand-in device (`rehearse`).  Run on a device: never so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msconv_runtime.artifact import Manifest, Rehearsed
from msconv_runtime.claims import CLAIMED, is_checked_here
from msconv_runtime.targets import device_of


@dataclass(frozen=True)
class Standing:
    """How far one target for NPUs was tried.  `claimed`: its proof was not made on this machine."""

    target: str
    interpreted: bool
    claimed: bool
    rehearsals: list[Rehearsed]

    @property
    def words(self) -> str:
        """`interpreted - rehearsed: SGLang 0.5.23, float32, ... - run on a device: never`."""
        rehearsed = "; ".join(map(summary, self.rehearsals))
        return " - ".join(
            (
                f"interpreted{f' ({CLAIMED})' * self.claimed}" if self.interpreted else "not interpreted",
                f"rehearsed: {rehearsed}" if rehearsed else "not rehearsed",
                "run on a device: never",
            )
        )

    @property
    def data(self) -> dict[str, Any]:
        return {
            "interpreted": self.interpreted,
            "checked_here": self.interpreted and not self.claimed,
            "rehearsed": [
                {
                    "sglang": r.sglang,
                    "device": r.device,
                    "mode": r.mode,
                    "flags": r.flags,
                    "machines": r.machines,
                    "copies": r.copies,
                    "page": r.page,
                    "end": r.end,
                    "prompts": r.prompts,
                    "tokens": r.tokens,
                    "calls": sum(r.calls.values()),
                    "max_call_error": r.max_call_error,
                    "max_logit_error": r.max_logit_error,
                }
                for r in self.rehearsals
            ],
            "run_on_device": False,
            "words": self.words,
        }


def standings(manifest: Manifest) -> list[Standing]:
    """The standing of each target for NPUs that the artifact has graphs for."""
    targets = dict.fromkeys(g.target for g in manifest.graphs if not device_of(g.target).has_run)
    proofs = {t: manifest.proof_for(t) for t in targets}
    return [
        Standing(t, p is not None, p is not None and not is_checked_here(manifest, p), manifest.rehearsals_for(t))
        for t, p in proofs.items()
    ]


def summary(rehearsed: Rehearsed) -> str:
    """One rehearsal in some words."""
    layout = f", {rehearsed.machines} machines" * (rehearsed.machines > 1)
    layout += f", {rehearsed.copies} copies" * (rehearsed.copies > 1)
    layout += ", a rank killed" * (rehearsed.end == "kill")
    return (
        f"SGLang {rehearsed.sglang}{layout}, {rehearsed.mode}, {rehearsed.tokens} tokens and "
        f"{sum(rehearsed.calls.values())} graph calls"
    )
