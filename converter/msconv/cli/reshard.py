"""`msconv reshard`: an artifact for another number of ranks, without the source checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from .command import Command
from .console import byte_progress, find_artifact
from .conversion import converted, say_plan
from .here import quoted
from .moving import ray_option, way_to_move
from .options import (
    UserPath,
    complete_artifacts,
    ep_option,
    jobs_option,
    memory_option,
    output_option,
    tp_option,
    worker_count,
)
from .report import refresh
from .result import json_option, show


@click.command("reshard", cls=Command)
@click.argument("artifact", type=UserPath(), shell_complete=complete_artifacts)
@tp_option
@ep_option
@output_option("[default: artifacts/<model>-tp<N>[-ep<M>]]")
@jobs_option
@memory_option
@ray_option
@click.option("--force", is_flag=True, help="Start over; replaces what is in the output directory.")
@json_option
def command(
    artifact: Path,
    tp: int,
    ep: int,
    output: Path | None,
    jobs: int | None,
    max_memory: int | None,
    ray: str | None,
    force: bool,
) -> None:
    """Write an artifact for another number of ranks, without the source checkpoint.

    The weight files are those of a direct conversion, byte for byte.  Graphs are not copied: they are made for
    one number of ranks.

    \b
    msconv reshard artifacts/Qwen3-8B-tp4 --tp 8 --output artifacts/Qwen3-8B-tp8
    """
    from ..steps import conversion as steps
    from ..steps.reshard import prepare

    way = way_to_move(ray, worker_count(jobs))
    conversion = prepare(find_artifact(artifact), tp, ep, output, way.jobs, max_memory, way.besides)
    say_plan(conversion)
    moving = way.mover(conversion.planned_memory_bytes)
    with moving as mover, byte_progress("resharding", conversion.plan.read_bytes) as advance:
        done = steps.run(conversion, force, advance, publish=refresh, mover=mover)
    note = "Graphs are made for one number of ranks and were not copied."
    show(converted(done, [note], f"msconv compile {quoted(done.artifact)}"))
