"""`msconv plan`: what a conversion would cost, and what the model needs on a device."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from msconv_runtime.artifact import is_artifact
from msconv_runtime.errors import MsconvError, UsageError
from msconv_runtime.targets import target_named
from msconv_runtime.units import human_bytes

from ..layout.memory import RESERVED
from ..location import LocalDirectory, Location, open_reference
from ..published import published
from .command import Command
from .console import say, visible
from .conversion import LayoutOptions, kept_groups_of, kept_lines, layout_options
from .options import Size, complete_targets, grouped
from .phases import in_words
from .prediction import Foreseen, foresee, prediction_lines
from .references import convert_command
from .result import Result, json_option, show
from .roofline import RooflineOptions, bound_artifact, bound_layout, roofline_options
from .roofline import data as roofline_data
from .roofline import lines as roofline_lines

if TYPE_CHECKING:
    from ..steps.costs import Cost
    from ..steps.estimate import Estimate


OF_CHECKPOINTS = (
    *("--dtype", "--quant", "--no-drafts", "--harmless", "--output", "--jobs"),
    *("--max-memory", "--device-memory", "--predict"),
)


@dataclass(frozen=True)
class DeviceOptions:
    """Load on a device: `batch` requests of `context` tokens.  `device_memory`: its bytes, None if not asked."""

    context: int
    batch: int
    device_memory: int | None


device_options = grouped(
    "device",
    DeviceOptions,
    click.option("--context", default=4096, show_default=True, type=click.IntRange(1), help="Tokens a sequence."),
    click.option(
        "--batch",
        default=1,
        show_default=True,
        type=click.IntRange(1),
        help="Requests at a time: `requests` of a recipe, --max-running-requests of SGLang.",
    ),
    click.option("--device-memory", type=Size(), help="Memory of one device, for example 64G."),
)


@click.command("plan", cls=Command)
@layout_options(
    "Directory (config.json is enough), owner/name[@revision], an address (s3://, https://), or a recipe's name.",
    "Where it would be written: that disk is tried.",
)
@device_options
@click.option(
    "--predict", is_flag=True, help="Find the time by trying the conversion, and a download, for some seconds."
)
@click.option(
    "--target",
    "proved_for",  # not `targets`, which a recipe sets
    multiple=True,
    shell_complete=complete_targets,
    help="With --predict: try the proof of graphs for this target too.  May be given several times.",
)
@roofline_options
@json_option
def command(
    layout: LayoutOptions,
    device: DeviceOptions,
    predict: bool,
    proved_for: tuple[str, ...],
    bounds: RooflineOptions,
) -> None:
    """Say what a conversion would cost, and what the model needs on a device.

    Reads headers only, and config.json alone if the weights are not there yet.

    \b
    msconv plan Qwen3-32B                            the recipe, against its devices
    msconv plan models/Qwen3-32B --tp 8
    msconv plan --model models/Qwen3-32B --tp 4 --context 32768 --batch 8 --device-memory 64G
    msconv plan models/Qwen3-32B --tp 8 --predict --target ascend910b     seconds of conversion and proof
    msconv plan Qwen3-32B --roofline 910B3           the least time that a token could take there
    msconv plan artifacts/Qwen3-8B-tp4 --tp 4 --roofline 910B3       of the artifact's own graphs
    """
    from ..steps.estimate import estimate

    if proved_for and not predict:
        raise UsageError("--target: it is the proof that is predicted for a target.", "Add --predict.")
    chosen = [target_named(name) for name in proved_for]
    asked = bounds.asked(device.context, device.batch)
    if asked is not None and is_artifact(Path(layout.model)):
        _refuse_of_checkpoints(layout.model)
        show(bound_artifact(Path(layout.model), layout.tp, layout.ep, asked))
        return
    location = _location(layout)
    planned = estimate(
        location,
        layout.tp,
        layout.ep,
        layout.dtype,
        layout.directory,
        layout.num_jobs,
        layout.max_memory,
        device.context,
        device.batch,
        device.device_memory,
        layout.harmless,
        layout.quant,
        not layout.no_drafts,
        predict,
    )
    for note in planned.checkpoint.notes:
        say(note)
    foreseen = foresee(location, planned, chosen) if predict else None
    data, lines = _data(planned, device), _costs(planned, layout.num_jobs, foreseen)
    data |= foreseen.data if foreseen else {}
    lines += _needs(planned, device)
    if asked is not None:
        found = bound_layout(planned, asked)
        data["roofline"] = roofline_data(found, asked)
        lines += roofline_lines(found, asked)
    show(Result(data, "\n".join(lines), next=_following(planned, layout, device)))


def _following(e: Estimate, layout: LayoutOptions, device: DeviceOptions) -> str:
    """The conversion that was planned, or the next one that fits devices and disk."""
    tp, ep, notes = layout.tp, layout.ep, []
    size = device.device_memory
    if size and not e.device.fits(size) and e.smallest_tp and e.smallest_tp != tp:
        tp, ep = e.smallest_tp, 1
        notes.append(f"the smallest tp that fits in {human_bytes(size)}")
    command = convert_command(tp, ep)
    if layout.output:
        command += f" --output {shlex.quote(str(layout.output))}"
    if e.lacking_bytes and not e.lacking_without_source:
        command += " --delete-source-as-you-go"
        notes.append("the disk cannot hold source and output")
    elif e.lacking_bytes:
        notes.append(f"first free {human_bytes(e.lacking_bytes)}, or give --output on another disk")
    return command + f"  # {'; '.join(notes)}" * bool(notes)


def _refuse_of_checkpoints(artifact: str) -> None:
    """Raises UsageError for options that an artifact has decided already."""
    ctx = click.get_current_context()
    named = {p.opts[-1]: ctx.get_parameter_source(p.name or "") for p in ctx.command.params}
    if given := [option for option in OF_CHECKPOINTS if named[option] is ParameterSource.COMMANDLINE]:
        raise UsageError(
            f"{artifact}: is an artifact, of which {', '.join(given)} would change nothing.",
            "Leave it out, or give the checkpoint.",
        )


def _location(layout: LayoutOptions) -> Location:
    """Where the model is; where no hub can be asked, a recipe's model is what msconv itself has of it."""
    try:
        return open_reference(layout.model, layout.hub, weights=False)
    except MsconvError as e:
        known = published(layout.model) if e.code == "hub" else None
        if known is None:
            raise
        say(f"{e.message}  Planned from the configuration that came with msconv.")
        return LocalDirectory(known)


def _data(e: Estimate, device: DeviceOptions) -> dict[str, Any]:
    plan, memory = e.plan, e.device
    rank = {
        "weight_bytes": plan.rank_bytes,
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "kv_bytes": memory.kv_bytes,
        "device_bytes": memory.total_bytes,
    }
    if plan.sizes.drafts:
        rank |= {
            "draft_weight_bytes": plan.draft_bytes,
            "draft_kv_bytes_per_token": memory.kv_bytes_per_token - e.model_kv_bytes_per_token,
        }
    if plan.sizes.experts:
        rank |= {"experts": plan.sizes.experts // plan.mesh.ep, "expert_bytes": plan.expert_bytes}
    calibrated = {} if e.calibration is None else {"calibration": _calibration(e.calibration)}
    return calibrated | {
        "model": e.checkpoint.name,
        "family": e.checkpoint.family.name,
        "parameters": plan.parameters,
        "dtype": plan.dtype,
        "quant": plan.quant,
        "kept": [asdict(group) for group in kept_groups_of(plan)],
        "ranks": [rank for _ in plan.mesh.ranks],
        "source_bytes": plan.read_bytes,
        "download_bytes": e.download_bytes,
        "free_bytes": e.free_bytes,
        "lacking_bytes": e.lacking_bytes,
        "output_bytes": plan.output_bytes,
        "peak_memory_bytes": e.peak_memory_bytes,
        "seconds": None if e.seconds is None else round(e.seconds, 1),
        "context": device.context,
        "batch": device.batch,
        "smallest_tp": e.smallest_tp,
        "device_memory_bytes": device.device_memory,
        "fits": memory.fits(device.device_memory) if device.device_memory else None,
    }


def _calibration(c: Cost) -> dict[str, Any]:
    kinds = [{"kind": str(t.kind), "bytes": t.amount, "bytes_per_s": round(t.per_s)} for t in c.tried]
    return {"startup_s": round(c.startup, 2), "took_s": round(c.took, 2), "kinds": kinds}


def _costs(e: Estimate, num_jobs: int, foreseen: Foreseen | None) -> list[str]:
    """Lines about the conversion, and what else is foreseen."""
    plan = e.plan
    kinds = f"{plan.quant} and {plan.dtype}" if plan.quant else plan.dtype
    rank_bytes, expert_bytes = human_bytes(plan.rank_bytes), human_bytes(plan.expert_bytes)
    name = visible(e.checkpoint.name, keep="")
    ranks = "1 rank" if plan.mesh.tp == 1 else f"{plan.mesh.tp} ranks"
    lines = [
        f"{name}: {e.checkpoint.family.name}, {plan.parameters / 1e9:.3f} billion parameters"
        + (", shapes from config.json (no weights here yet)" if e.assumed else ""),
        f"source      {human_bytes(plan.read_bytes)} of {plan.source_dtype}",
        f"output      {human_bytes(plan.output_bytes)} of {kinds}: {ranks} of {rank_bytes}",
    ]
    lines += [f"kept        {line}" for line in kept_lines(kept_groups_of(plan))] if plan.quant else []
    if experts := plan.sizes.experts:
        shared = "whole" if plan.mesh.moe_tp == 1 else f"each over {plan.mesh.moe_tp} ranks"
        lines.append(
            f"experts     {experts // plan.mesh.ep} of {experts} a rank, {shared}: {expert_bytes} + "
            f"{human_bytes(plan.rank_bytes - plan.expert_bytes)} of all else, the same on every rank"
        )
    lines.append(f"memory      {human_bytes(e.peak_memory_bytes)} at most, {num_jobs} jobs")
    if e.download_bytes:
        slow, fast = (in_words(e.download_bytes * 8 / rate) for rate in (100e6, 1e9))
        lines.append(f"download    {human_bytes(e.download_bytes)}: {slow} at 100 Mbit/s, {fast} at 1 Gbit/s")
    if e.free_bytes is not None:
        lacks = f"{human_bytes(e.lacking_bytes)} too little" if e.lacking_bytes else "enough"
        lines.append(f"disk        {human_bytes(e.free_bytes)} free where it would be written: {lacks}")
    if e.seconds is not None:
        how = "as fast as this disk was just now"
        if e.calibration is not None:
            how = f"by {e.calibration.took:.1f} s of it, tried here"
        lines.append(f"time        about {in_words(max(1, e.seconds))}, {how}")
    lines += prediction_lines(e.calibration.tried) if e.calibration else []
    return lines + (foreseen.lines if foreseen else [])


def _needs(e: Estimate, device: DeviceOptions) -> list[str]:
    """Lines about a device."""
    memory = e.device
    lines = [
        f"a device    {human_bytes(memory.weight_bytes)} weights + {human_bytes(memory.kv_bytes)} KV cache "
        f"({device.batch} x {device.context} tokens of {human_bytes(memory.kv_bytes_per_token)}) = "
        f"{human_bytes(memory.total_bytes)}"
    ]
    if e.plan.sizes.drafts:
        own = memory.kv_bytes_per_token - e.model_kv_bytes_per_token
        lines.append(
            f"            of it a draft, if one is served: {human_bytes(e.plan.draft_bytes)} weights + "
            f"{human_bytes(own * device.batch * device.context)} KV cache"
        )
    if device.device_memory:
        share = f"{RESERVED:.0%} kept free"
        verdict = "fits" if memory.fits(device.device_memory) else "does not fit"
        smallest = f"smallest tp that fits: {e.smallest_tp}" if e.smallest_tp else "no tp tried fits"
        lines.append(f"            {verdict} in {human_bytes(device.device_memory)} ({share}); {smallest}")
    return lines
