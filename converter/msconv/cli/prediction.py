"""What `msconv plan --predict` says of downloads and proofs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msconv_runtime.errors import MsconvError
from msconv_runtime.targets import Target
from msconv_runtime.units import human_bytes

from ..location import Location
from .console import import_torch_alone
from .phases import in_words

if TYPE_CHECKING:
    from ..steps.costs import Cost, Tried
    from ..steps.estimate import Estimate


@dataclass
class Foreseen:
    """Fields and lines."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def foresee(location: Location, planned: Estimate, targets: Iterable[Target]) -> Foreseen:
    """What a download takes, and the proof of each target.  Raises MsconvError."""
    from ..steps.coming import predict_coming

    coming = predict_coming(location, planned)
    found = Foreseen({"download": coming and _fields(coming), "verify": []})
    found.lines += _lines("download", coming) if coming else ["download    nothing: the source is here"]
    if planned.assumed:
        found.lines[-1:] = []  # where it will come from is not known
    for target in targets:
        _foresee_proof(found, planned, target)
    return found


def _foresee_proof(found: Foreseen, planned: Estimate, target: Target) -> None:
    import_torch_alone()
    from ..steps.proof import NotPredicted, predict_proof

    head: dict[str, Any] = {"target": target.name, "why_not": None}
    try:
        cost = predict_proof(planned, target)
    except (NotPredicted, MsconvError) as e:
        why_not = e.message if isinstance(e, MsconvError) else str(e)
        found.data["verify"].append({**head, "why_not": why_not, **dict.fromkeys(FIELDS)})
        found.lines.append(f"proof       not predicted for {target.name}: {why_not}")
        return
    found.data["verify"].append({**head, **_fields(cost)})
    found.lines += _lines("proof", cost, f" for {target.name}")


FIELDS = ("seconds", "read_bytes", "peak_memory_bytes", "startup_s", "took_s", "kinds")


def _fields(cost: Cost) -> dict[str, Any]:
    kinds = [
        {"kind": str(t.kind), "amount": round(t.amount), "unit": t.unit, "per_s": float(f"{t.per_s:.4g}")}
        for t in cost.tried
    ]
    values = (cost.seconds, cost.read_bytes, cost.memory_bytes, cost.startup, cost.took, kinds)
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in zip(FIELDS, values, strict=True)}


def _lines(title: str, cost: Cost, what: str = "") -> list[str]:
    return [
        f"{title:12}about {in_words(max(1, cost.seconds))}{what}, {human_bytes(cost.read_bytes)} read, "
        f"{human_bytes(cost.memory_bytes)} of memory at most; by {cost.took:.1f} s of it, tried here",
        *prediction_lines(cost.tried),
    ]


def prediction_lines(tried: Iterable[Tried]) -> list[str]:
    """A line for each kind of work."""
    return [f"            {t.kind}: {_amount(t)}" for t in tried]


def _amount(t: Tried) -> str:
    if t.unit == "bytes":
        rate = f"{human_bytes(t.per_s)}/s" if t.per_s else "not tried, too few"
        return f"{human_bytes(t.amount)} at {rate}"
    return f"{t.amount:,.0f} {t.unit}, {in_words(max(1, t.seconds))}"
