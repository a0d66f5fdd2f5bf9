"""Options of a layout and words about a conversion, for the commands that make or plan one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msconv_runtime.units import human_bytes

from ..checkpoint.hubs import Hub
from ..checkpoint.urls import StoreUrl
from ..layout.kept import KeptGroup, kept_groups
from ..quant import formats_named
from ..workspace.names import before_upload
from .console import say
from .options import (
    Decorator,
    OutputPlace,
    dtype_option,
    ep_option,
    grouped,
    jobs_option,
    memory_option,
    no_drafts_option,
    output_option,
    quant_option,
    tp_option,
    worker_count,
)
from .references import first_argument, harmless_option, model_option, recipe_option, source_option
from .result import Result

if TYPE_CHECKING:
    from ..layout.plan import Plan
    from ..steps.conversion import Conversion, Converted

MOST_NAMES = 12  # folded, of a format


@dataclass(frozen=True)
class LayoutOptions:
    """Values of the options that convert and plan share: which checkpoint, into what, and what it may take."""

    model: str
    tp: int
    ep: int
    dtype: str | None
    quant: str | None
    output: Path | StoreUrl | None
    jobs: int | None
    max_memory: int | None
    hub: Hub
    harmless: tuple[str, ...]
    no_drafts: bool

    @property
    def store(self) -> str:
        """The address that the artifact shall go to, "" if that is a directory."""
        return self.output.url if isinstance(self.output, StoreUrl) else ""

    @property
    def directory(self) -> Path | None:
        """Where the artifact is written on this machine, None where --output says nothing."""
        return before_upload(self.output.url) if isinstance(self.output, StoreUrl) else self.output

    @property
    def num_jobs(self) -> int:
        """The worker threads that are meant."""
        return worker_count(self.jobs)


def layout_options(model: str, output: str) -> Decorator:
    """Options that the command gets as one `layout`.  `model`, `output`: help lines of those two."""
    return grouped(
        "layout",
        LayoutOptions,
        first_argument,
        model_option(model, is_required=True),
        recipe_option,
        tp_option,
        ep_option,
        dtype_option,
        quant_option,
        output_option(output, OutputPlace()),
        jobs_option,
        memory_option,
        source_option,
        harmless_option,
        no_drafts_option,
    )


def kept_groups_of(plan: Plan) -> list[KeptGroup]:
    """What a plan's tensors are kept as."""
    return kept_groups(((t.name, t.dtype, t.nbytes) for t in plan.tensors), formats_named(plan.quant))


def kept_lines(groups: Sequence[KeptGroup]) -> list[str]:
    """A line for each format: how much, and of what."""
    return [
        f"{g.title}{f', {g.dtype}' if not g.format else ''}: {g.tensors} tensors, {human_bytes(g.nbytes)} a rank: "
        + ", ".join(g.names[:MOST_NAMES])
        + (f" and {len(g.names) - MOST_NAMES} more" if len(g.names) > MOST_NAMES else "")
        for g in groups
    ]


def say_plan(conversion: Conversion) -> None:
    """Say what will be done."""
    for note in conversion.notes:
        say(note)
    plan = conversion.plan
    mesh = f"tp {plan.mesh.tp}" + (f", ep {plan.mesh.ep}" if plan.mesh.ep > 1 else "")
    say(
        f"{conversion.name}: {conversion.family}, {plan.parameters / 1e9:.3f} billion parameters, "
        f"{plan.source_dtype} -> {plan.dtype}, {mesh}: "
        f"{human_bytes(plan.rank_bytes)} per rank, {human_bytes(plan.output_bytes)} in all"
    )
    if plan.source_dtype != plan.dtype:
        say(f"Values are cast from {plan.source_dtype} to {plan.dtype}; the manifest records it.")
    for kept in sorted({f.kept_as.title for f in plan.formats.values() if f.is_kept}):
        say(f"Matrices stay as they are stored: {kept}.")
    for made in sorted({f.title for f in plan.encoded.values()}):
        say(f"{len(plan.encoded)} matrices become {made}; embedding, head, norms and routers stay as values.")
    if plan.sizes.drafts:
        say(f"With its draft, the layer of multi-token prediction: {human_bytes(plan.draft_bytes)} a rank.")
    if plan.vocab[1] > plan.vocab[0]:
        say(f"Vocabulary of {plan.vocab[0]} padded to {plan.vocab[1]} rows; the padding is never sampled.")


def converted(done: Converted, lines: Sequence[str], next_step: str, store: str = "") -> Result:
    """The result of a conversion that was done.  `lines` follow the one that sums it up; `store`: the address that
    it went to."""
    rate = human_bytes(done.bytes_read / max(done.seconds, 1e-9))
    verb = "Already complete" if not done.bytes_read else "Resumed and finished" if done.resumed else "Written"
    summary = (
        f"{verb}: {store or done.artifact}, read {human_bytes(done.bytes_read)}, "
        f"wrote {human_bytes(done.bytes_written)} "
        f"in {done.seconds:.1f} s ({rate}/s), peak memory {human_bytes(done.peak_rss_bytes)}"
    )
    data = {
        "artifact": store or str(done.artifact),
        "bytes_read": done.bytes_read,
        "bytes_written": done.bytes_written,
        "seconds": round(done.seconds, 3),
        "peak_rss_bytes": done.peak_rss_bytes,
        "resumed": done.resumed,
    }
    return Result(data, lines=[summary, *lines], next=next_step)
