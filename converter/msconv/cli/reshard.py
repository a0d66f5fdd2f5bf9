"""`msconv reshard`: an artifact for another number of ranks, without the source checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .command import Command
from .console import (
    byte_progress,
    complete_artifacts,
    ep_option,
    jobs_option,
    json_option,
    memory_option,
    say,
    tp_option,
)
from .convert import print_done, print_plan
from .report import refresh


@click.command("reshard", cls=Command)
@click.argument("artifact", type=click.Path(path_type=Path), shell_complete=complete_artifacts)
@tp_option
@ep_option
@click.option("--output", type=click.Path(path_type=Path), help="[default: artifacts/<model>-tp<N>]")
@jobs_option
@memory_option
@click.option("--force", is_flag=True, help="Start over; replaces what is in the output directory.")
@json_option
def command(
    artifact: Path,
    tp: int,
    ep: int,
    output: Path | None,
    jobs: int | None,
    max_memory: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write an artifact for another number of ranks, without the source checkpoint.

    The weight files are those of a direct conversion, byte for byte.  Graphs are not copied: they are made for
    one number of ranks.

    \b
    msconv reshard artifacts/Qwen3-8B-tp4 --tp 8 --output artifacts/Qwen3-8B-tp8
    """
    from ..steps import conversion as steps
    from ..steps.reshard import prepare

    conversion = prepare(artifact, tp, ep, output, jobs or min(2, os.cpu_count() or 1), max_memory)
    print_plan(conversion)
    with byte_progress("resharding", conversion.plan.read_bytes) as advance:
        done = steps.run(conversion, force, advance, publish=refresh)
    print_done(done, as_json)
    say("Graphs are made for one number of ranks and were not copied.")
    say(f"Next: msconv compile {done.artifact} --target cpu")
