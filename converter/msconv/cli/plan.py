"""`msconv plan`: what a conversion would cost, and what the model needs on a device."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..checkpoint.reference import Hub
from ..layout.memory import RESERVED
from ..location import open_reference
from .command import Command
from .console import (
    Size,
    dtype_option,
    emit,
    ep_option,
    human,
    jobs_option,
    json_option,
    memory_option,
    say,
    show,
    tp_option,
)
from .references import convert_command, harmless_option, model_option, recipe_option, source_option


@click.command("plan", cls=Command)
@model_option(True, "Directory (config.json is enough), owner/name[@revision], or a recipe's name.")
@recipe_option
@tp_option
@ep_option
@dtype_option
@click.option("--output", type=click.Path(path_type=Path), help="Where it would be written: that disk is tried.")
@jobs_option
@memory_option
@source_option
@harmless_option
@click.option("--context", default=4096, show_default=True, type=click.IntRange(1), help="Tokens a sequence.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Sequences at once.")
@click.option("--device-memory", type=Size(), help="Memory of one device, for example 64G.")
@json_option
def command(
    model: str,
    tp: int,
    ep: int,
    dtype: str | None,
    output: Path | None,
    jobs: int | None,
    max_memory: int | None,
    hub: Hub,
    harmless: tuple[str, ...],
    context: int,
    batch: int,
    device_memory: int | None,
    as_json: bool,
) -> None:
    """Say what a conversion would cost, and what the model needs on a device.

    Reads headers only, and config.json alone if the weights are not there yet.

    \b
    msconv plan --model Qwen3-32B                    the recipe, against its devices
    msconv plan --model models/Qwen3-32B --tp 8
    msconv plan --model models/Qwen3-32B --tp 4 --context 32768 --batch 8 --device-memory 64G
    """
    from ..steps.estimate import estimate

    jobs = jobs or min(2, os.cpu_count() or 1)
    source = open_reference(model, hub, weights=False)
    e = estimate(source, tp, ep, dtype, output, jobs, max_memory, context, batch, device_memory, harmless)
    plan, device = e.plan, e.device
    for note in e.checkpoint.notes:
        say(note)
    hint = f"Next: {convert_command(tp, ep)}"
    if as_json:
        rank: dict[str, object] = {
            "weight_bytes": plan.rank_bytes,
            "kv_bytes_per_token": device.kv_bytes_per_token,
            "kv_bytes": device.kv_bytes,
            "device_bytes": device.total_bytes,
        }
        if plan.sizes.experts:
            rank |= {"experts": plan.sizes.experts // ep, "expert_bytes": plan.expert_bytes}
        emit(
            {
                "model": e.checkpoint.name,
                "family": e.checkpoint.family.name,
                "parameters": plan.parameters,
                "dtype": plan.dtype,
                "ranks": [rank for _ in plan.mesh.ranks],
                "source_bytes": plan.read_bytes,
                "download_bytes": e.download_bytes,
                "output_bytes": plan.output_bytes,
                "peak_memory_bytes": e.peak_memory_bytes,
                "seconds": None if e.seconds is None else round(e.seconds, 1),
                "context": context,
                "batch": batch,
                "smallest_tp": e.smallest_tp,
                "device_memory_bytes": device_memory,
                "fits": device.fits(device_memory) if device_memory else None,
            }
        )
        say(hint)
        return
    show(
        f"{e.checkpoint.name}: {e.checkpoint.family.name}, {plan.parameters / 1e9:.3f} billion parameters"
        + (", shapes from config.json (no weights here yet)" if e.assumed else "")
    )
    show(f"source      {human(plan.read_bytes)} of {plan.source_dtype}; to download {human(e.download_bytes)}")
    show(
        f"output      {human(plan.output_bytes)} of {plan.dtype}: {plan.mesh.tp} ranks of {human(plan.rank_bytes)}"
    )
    if experts := plan.sizes.experts:
        shared = "whole" if plan.mesh.moe_tp == 1 else f"each over {plan.mesh.moe_tp} ranks"
        show(
            f"experts     {experts // ep} of {experts} a rank, {shared}: {human(plan.expert_bytes)} + "
            f"{human(plan.rank_bytes - plan.expert_bytes)} of all else, the same on every rank"
        )
    show(f"memory      {human(e.peak_memory_bytes)} at most, {jobs} jobs")
    if e.seconds is not None:
        show(f"time        about {e.seconds:.0f} s, as fast as this disk was just now")
    show(
        f"a device    {human(device.weight_bytes)} weights + {human(device.kv_bytes)} KV cache "
        f"({batch} x {context} tokens of {human(device.kv_bytes_per_token)}) = {human(device.total_bytes)}"
    )
    if device_memory:
        share = f"{RESERVED:.0%} kept free"
        verdict = "fits" if device.fits(device_memory) else "does not fit"
        smallest = f"smallest tp that fits: {e.smallest_tp}" if e.smallest_tp else "no tp tried fits"
        show(f"            {verdict} in {human(device_memory)} ({share}); {smallest}")
    say(hint)
