"""What a proof found, and what the manifest keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from msconv_runtime import claims
from msconv_runtime.artifact import Artifact, Verified
from msconv_runtime.artifact.consistency import DEVIATIONS
from msconv_runtime.targets import Target

from ..workspace.lock import exclusive
from .comparison import Comparison

if TYPE_CHECKING:
    from .int8.drift import Drift
    from .int8.run import Led

LED = "float32, led"  # as `mode`: codes are the candidate's where rounding is a tie
EACH_LAYER = "float32, each layer from the reference's input"  # as `mode`: errors do not add up


@dataclass(frozen=True)
class Proof:
    """The outcome.  `missing` and `unused` are tensor names: graph parameters against stored weights.

    Of int8 artifacts: `led`, what there was to say of codes; `drift` from the unquantised model, with the bound
    `max_kl` if somebody set one; `tensors`, how many were compared bit for bit.  `overflow`: where logits in the
    target's own precision are not finite.
    """

    target: str
    ranks: int
    comparison: Comparison
    missing: list[str]
    unused: list[str]
    seconds: float
    layers: int = 0
    half_precision: dict[str, float] = field(default_factory=dict)
    overflow: str = ""
    led: Led | None = None
    drift: Drift | None = None
    max_kl: float | None = None
    tensors: int = 0
    weights_bytes: int = 0
    is_resumed: bool = False

    @property
    def ok(self) -> bool:
        agrees = self.comparison.ok and (self.led is None or self.led.ok)
        return agrees and not self.missing and not self.unused and not self.is_adrift and not self.not_finite

    @property
    def seconds_per_gb(self) -> float | None:
        """Of the artifact's weights, 10^9 bytes; None if this run had not all to do, or looked at some layers."""
        if self.is_resumed or self.layers or not self.weights_bytes:
            return None
        return self.seconds / (self.weights_bytes / 1e9)

    @property
    def is_adrift(self) -> bool:
        return self.max_kl is not None and self.drift is not None and not self.drift.kl <= self.max_kl

    @property
    def not_finite(self) -> str:
        """What is no number though all that was compared agrees: that is served to nobody, and no proof."""
        if self.overflow:
            return f"in the target's own precision logits are not finite at {self.overflow}"
        return self.drift.not_finite if self.drift else ""

    @property
    def int8(self) -> dict[str, str | int | float]:
        """What is said of a proof of int8, {} of another."""
        if self.led is None:
            return {}
        found = {"tensors_compared": self.tensors, **self.led.settings}
        found |= self.drift.settings if self.drift else {}
        return found | ({"drift_kl_bound": self.max_kl} if self.max_kl is not None else {})

    @property
    def place(self) -> str:
        """The first thing that is wrong."""
        return (self.led.place if self.led else "") or self.comparison.first or self.not_finite


def entry_of(artifact: Artifact, proof: Proof) -> Verified:
    """What the manifest keeps of a proof."""
    weights, comparison, drift = artifact.weights, proof.comparison, proof.drift
    int8 = {f"int8_{name}": n for name, n in proof.int8.items() if not isinstance(n, str)}
    own = {DEVIATIONS: comparison.deviation_sum} if comparison.own_errors else {}
    rounded = f", weights rounded to {weights.dtype}" if weights.source_dtype != weights.dtype else ""
    return Verified(
        target=proof.target,
        weights_digest=weights.digest,
        graph_digests=sorted(g.digest for g in artifact.graphs(proof.target)),
        reference=f"transformers on {artifact.manifest.model.source}{rounded}"
        + (f"; {drift.words}" if drift else ""),
        mode=LED if proof.led else EACH_LAYER if comparison.own_errors else "float32",
        bound=comparison.bound,
        max_abs_logit_error=comparison.max_abs_logit_error,
        argmax_agreement=comparison.argmax_agreement,
        ranks=artifact.tp,
        logits_compared=comparison.rows,
        settings={**comparison.by_phase, **proof.half_precision, **int8, **own},
        norms=comparison.probes,
    )


def record(root: Path, target: Target, entry: Verified | None) -> None:
    """Put the target's proof into the manifest, or take an earlier one out."""
    with exclusive(root):
        artifact = Artifact(root)
        before = artifact.manifest.verified
        kept = [v for v in before if v.target != target.name] + ([entry] if entry else [])
        if sorted(kept, key=lambda v: v.target) != before:
            artifact.changed(verified=sorted(kept, key=lambda v: v.target))
        if entry:
            claims.note(artifact.manifest, entry)
