"""`msconv plan --roofline`: its options, the object of --json, and its lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msconv_runtime.units import human_bytes

from .options import Finite, grouped
from .result import Result

if TYPE_CHECKING:
    from ..steps.estimate import Estimate
    from ..steps.roofline import Asked, Phase, Roofline

NAMES = {"memory": "memory", "compute": "products", "link": "links"}


@dataclass(frozen=True)
class RooflineOptions:
    """`roofline`: the device, None if bounds are not asked for."""

    roofline: str | None
    draft_tokens: int
    accept_length: float

    def asked(self, context: int, batch: int) -> Asked | None:
        """What to bound, None if nothing.  Raises UsageError for a device that is not known, at once."""
        if self.roofline is None:
            if self.draft_tokens or self.accept_length:
                raise click.UsageError("--draft-tokens and --accept-length go with --roofline.")
            return None
        from msconv_runtime.targets import figures_named

        from ..steps.roofline import Asked

        figures_named(self.roofline)
        return Asked(self.roofline, context, batch, self.draft_tokens, self.accept_length)


roofline_options = grouped(
    "bounds",
    RooflineOptions,
    click.option(
        "--roofline",
        metavar="DEVICE",
        help="Bounds of what the layout's graphs could do on a device, from published figures: 910B2, 910C.  "
        "Measures nothing.",
    ),
    click.option(
        "--draft-tokens",
        default=0,
        type=click.IntRange(0, 1024),
        help="With --roofline: tokens of each request that a step verifies, --speculative-num-draft-tokens of "
        "SGLang.  [default: no drafts]",
    ),
    click.option(
        "--accept-length",
        default=0.0,
        type=Finite(0, 1024),
        help="With --draft-tokens: tokens that such a step gives on average.",
    ),
)


def bound_layout(planned: Estimate, asked: Asked) -> Roofline:
    """Make the planned layout's graphs and bound them."""
    from ..steps.roofline import roofline

    return roofline(planned, asked)


def bound_artifact(root: Path, tp: int, ep: int, asked: Asked) -> Result:
    """The answer for an artifact: only its graphs are looked at."""
    from ..layout.cuts import make_mesh
    from ..steps.roofline import roofline_of_artifact

    found = roofline_of_artifact(root, make_mesh(tp, ep), asked)
    about = {"model": str(root), "context": asked.context, "batch": asked.sequences}
    return Result({**about, "roofline": data(found, asked)}, "\n".join(lines(found, asked)))


def data(found: Roofline, asked: Asked) -> dict[str, Any]:
    """Of --json.  Everything in seconds is a bound."""
    figures = found.figures
    return {
        "is_bound": True,
        "is_measured": False,
        "device": figures.device,
        "target": found.target.name,
        "memory_bytes_per_s": figures.memory_bytes_per_s,
        "half_ops_per_s": figures.half_ops_per_s,
        "int8_ops_per_s": figures.int8_ops_per_s,
        "link_bytes_per_s": figures.link_bytes_per_s,
        "outer_bytes_per_s": figures.outer_bytes_per_s,
        "sources": [{"what": what, "address": address} for what, address in figures.sources],
        "assumed": list(found.assumed),
        "graphs": "made" if found.made else "compiled",
        "layers_read": found.layers_read,
        "draft_tokens": asked.draft_tokens,
        "accept_length": asked.accept_length,
        "decode": _phase(found.decode, found.tp),
        "prefill": _phase(found.prefill, found.tp),
    }


def _phase(phase: Phase, tp: int) -> dict[str, Any]:
    from ..mindir.bounds import moved_bytes

    work, bound = phase.work, phase.bound
    return {
        "role": phase.role,
        "tokens": phase.batch.tokens,
        "nodes": work.nodes,
        "launches": work.launches,
        "weight_bytes": round(work.weight_bytes),
        "kv_bytes": work.kv_bytes,
        "activation_bytes": round(work.activation_bytes),
        "half_operations": round(work.half_operations),
        "int8_operations": round(work.int8_operations),
        "collectives": sum(work.collectives.values()),
        "moved_bytes": round(moved_bytes(work.collectives, tp)),
        "memory_s": bound.memory,
        "compute_s": bound.compute,
        "link_s": bound.link,
        "bound_s": bound.seconds,
        "bound_by": bound.by,
        "one_after_another_s": bound.one_after_another,
        "unknown": bound.unknown,
        "seconds_per_token": phase.seconds_per_token,
        "tokens_per_second": phase.tokens_per_second,
    }


def lines(found: Roofline, asked: Asked) -> list[str]:
    """For people."""
    made = f"of {found.layers_read} layers, made for this" if found.made else "the artifact's"
    told = [
        f"roofline    {found.figures.device}, {found.target.name} graphs ({made}): bounds from published figures, "
        "not measurements",
        *_told("decode", found.decode, asked.sequences, found.tp),
        *_told("prefill", found.prefill, 1, found.tp),
    ]
    told += [f"            {line}" for line in found.assumed]
    return told + [f"            source: {what}: {address}" for what, address in found.figures.sources]


def _told(name: str, phase: Phase, requests: int, tp: int) -> list[str]:
    from ..mindir.bounds import moved_bytes

    work, bound = phase.work, phase.bound
    parts = ", ".join(f"{NAMES[part]} {_ms(s)}" for part, s in bound.parts.items())
    if bound.seconds is None:
        first = f"{name}: no bound: no figure of this device's {' and '.join(NAMES[u] for u in bound.unknown)}"
        first += " was found with a source"
    elif name == "decode":
        first = f"{name}: at least {_ms(phase.seconds_per_token)} a token, {requests} requests at a time: at most "
        first += f"{phase.tokens_per_second or 0:,.0f} tokens/s"
    else:
        first = f"{name}: at least {_ms(bound.seconds)} for {phase.batch.tokens} tokens, "
        first += f"{_us(phase.seconds_per_token)} a token: at most {phase.tokens_per_second or 0:,.0f} tokens/s"
    chain = "" if bound.one_after_another is None else f"; node after node {_ms(bound.one_after_another)}"
    return [
        f"            {first}",
        f"            a call: {parts}{chain}",
        f"            {work.launches} launches, {human_bytes(work.weight_bytes)} of weights + "
        f"{human_bytes(work.kv_bytes)} of cache, {(work.half_operations + work.int8_operations) / 1e9:,.1f} G "
        f"operations, {human_bytes(moved_bytes(work.collectives, tp))} to other ranks",
    ]


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e3:.3g} ms"


def _us(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e6:.3g} us"
