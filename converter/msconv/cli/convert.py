"""`msconv convert`: a checkpoint becomes an artifact."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..checkpoint.reference import Hub
from ..layout.memory import kv_bytes_per_token
from ..location import open_reference
from ..steps.conversion import Conversion, Converted
from .command import Command
from .console import (
    byte_progresses,
    dtype_option,
    emit,
    ep_option,
    human,
    jobs_option,
    json_option,
    memory_option,
    say,
    tp_option,
)
from .references import (
    convert_command,
    harmless_option,
    model_option,
    recipe_argument,
    recipe_option,
    source_option,
)
from .report import refresh


@click.command("convert", cls=Command)
@model_option(True, "Directory of a checkpoint, owner/name[@revision], or a recipe's name.")
@recipe_option
@tp_option
@ep_option
@dtype_option
@click.option("--output", type=click.Path(path_type=Path), help="[default: artifacts/<model>-tp<N>]")
@jobs_option
@memory_option
@source_option
@harmless_option
@click.option(
    "--delete-source-as-you-go",
    "delete_source",
    is_flag=True,
    help="Delete each downloaded shard once its weights are written: for disks that cannot hold both.",
)
@click.option("--dry-run", is_flag=True, help="Only say what it would do; reads headers, writes nothing.")
@click.option("--force", is_flag=True, help="Start over; replaces what is in the output directory.")
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
    delete_source: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Convert a checkpoint: reshard it for tensor and expert parallelism into an artifact.

    What is not a directory is pulled from a hub, and converted while it downloads.
    Run again after a crash: it resumes, and the result is the same to the byte.

    \b
    msconv convert --model Qwen3-8B                  as the recipe says
    msconv convert --model Qwen3-8B --tp 2           but for two ranks
    msconv convert --model models/Qwen3-8B --tp 4
    msconv convert --model models/Qwen3-8B --tp 8 --dtype float16 --output out
    msconv convert --model models/DeepSeek-V3 --tp 16 --ep 16
    msconv convert --model Qwen/Qwen3-8B@main --tp 4 --source modelscope
    """
    from ..steps import conversion as steps
    from ..steps.convert import prepare

    jobs = jobs or min(2, os.cpu_count() or 1)
    source = open_reference(model, hub)
    conversion = prepare(source, tp, ep, dtype, output, jobs, max_memory, delete_source, harmless)
    plan = conversion.plan
    print_plan(conversion)
    if dry_run:
        rank = {
            "weight_bytes": plan.rank_bytes,
            "kv_bytes_per_token": kv_bytes_per_token(plan.sizes, plan.mesh, plan.dtype),
        }
        if as_json:
            emit(
                {
                    "ranks": [rank for _ in plan.mesh.ranks],
                    "download_bytes": conversion.download_bytes,
                    "output_bytes": plan.output_bytes,
                    "peak_memory_bytes": conversion.planned_memory_bytes,
                }
            )
        say(f"Nothing was written. Output would be {conversion.output}.")
        say(f"Next: {convert_command(tp, ep)}")
        return
    bars = {"downloading": conversion.download_bytes, "converting": plan.read_bytes}
    with byte_progresses(bars) as advance:
        done = steps.run(conversion, force, advance["converting"], advance["downloading"], refresh)
    print_done(done, as_json)
    say(f"Next: msconv compile {done.artifact}{recipe_argument() or ' --target cpu'}")


def print_plan(conversion: Conversion) -> None:
    """What will be done, for people."""
    for note in conversion.notes:
        say(note)
    plan = conversion.plan
    mesh = f"tp {plan.mesh.tp}" + (f", ep {plan.mesh.ep}" if plan.mesh.ep > 1 else "")
    say(
        f"{conversion.name}: {conversion.family}, {plan.parameters / 1e9:.3f} billion parameters, "
        f"{plan.source_dtype} -> {plan.dtype}, {mesh}: "
        f"{human(plan.rank_bytes)} per rank, {human(plan.output_bytes)} in all"
    )
    if plan.source_dtype != plan.dtype:
        say(f"Values are cast from {plan.source_dtype} to {plan.dtype}; the manifest records it.")
    if plan.vocab[1] > plan.vocab[0]:
        say(f"Vocabulary of {plan.vocab[0]} padded to {plan.vocab[1]} rows; the padding is never sampled.")


def print_done(done: Converted, as_json: bool) -> None:
    """What was done."""
    if as_json:
        emit(
            {
                "artifact": str(done.artifact),
                "bytes_read": done.bytes_read,
                "bytes_written": done.bytes_written,
                "seconds": round(done.seconds, 3),
                "peak_rss_bytes": done.peak_rss_bytes,
                "resumed": done.resumed,
            }
        )
    rate = done.bytes_read / max(done.seconds, 1e-9) / 1e9
    verb = "Already complete" if not done.bytes_read else "Resumed and finished" if done.resumed else "Written"
    say(
        f"{verb}: {done.artifact}, read {human(done.bytes_read)}, wrote {human(done.bytes_written)} "
        f"in {done.seconds:.1f} s ({rate:.2f} GB/s), peak memory {human(done.peak_rss_bytes)}"
    )
