"""`msconv convert`: a checkpoint becomes an artifact."""

from __future__ import annotations

import click

from msconv_runtime.errors import UsageError

from ..layout.memory import kv_bytes_per_token
from ..location import open_reference
from ..steps.conversion import Conversion
from .command import Command
from .console import byte_progresses
from .conversion import LayoutOptions, converted, layout_options, say_plan
from .here import quoted
from .moving import Way, ray_option, way_to_move
from .references import convert_command, recipe_argument
from .report import refresh
from .result import Result, json_option, show


@click.command("convert", cls=Command)
@layout_options(
    "Directory of a checkpoint, owner/name[@revision], or a recipe's name.", "[default: artifacts/<model>-tp<N>]"
)
@click.option(
    "--delete-source-as-you-go",
    "delete_source",
    is_flag=True,
    help="Delete each downloaded shard once its weights are written: for disks that cannot hold both.",
)
@ray_option
@click.option("--dry-run", is_flag=True, help="Only say what it would do; reads headers, writes nothing.")
@click.option("--force", is_flag=True, help="Start over; replaces what is in the output directory.")
@json_option
def command(layout: LayoutOptions, delete_source: bool, ray: str | None, dry_run: bool, force: bool) -> None:
    """Convert a checkpoint: reshard it for tensor and expert parallelism into an artifact.

    What is not a directory is pulled from a hub, and converted while it downloads.
    Run again after a crash: it resumes, and the result is the same to the byte.

    \b
    msconv convert Qwen3-8B                          as the recipe says
    msconv convert Qwen3-8B --tp 2                   but for two ranks
    msconv convert models/Qwen3-8B --tp 4            a directory; --model may stand before it
    msconv convert --model models/Qwen3-8B --tp 8 --dtype float16 --output out
    msconv convert --model models/DeepSeek-V3 --tp 16 --ep 16
    msconv convert --model Qwen/Qwen3-8B@main --tp 4 --source modelscope
    msconv convert --model /shared/DeepSeek-V3 --tp 16 --ep 16 --output /shared/out --ray auto
    """
    from ..steps import conversion as steps
    from ..steps.convert import prepare

    way = way_to_move(ray, layout.num_jobs)
    _refuse_both(way, delete_source)
    conversion = prepare(
        open_reference(layout.model, layout.hub),
        layout.tp,
        layout.ep,
        layout.dtype,
        layout.output,
        layout.num_jobs,
        layout.max_memory,
        delete_source,
        layout.harmless,
        layout.quant,
        way.besides,
    )
    say_plan(conversion)
    if dry_run:
        show(_planned(conversion, layout))
        return
    bars = {"downloading": conversion.download_bytes, "converting": conversion.plan.read_bytes}
    with way.mover(conversion.planned_memory_bytes) as mover, byte_progresses(bars) as advance:
        done = steps.run(conversion, force, advance["converting"], advance["downloading"], refresh, mover)
    show(converted(done, [], f"msconv compile {quoted(done.artifact)}{recipe_argument()}"))


def _refuse_both(way: Way, delete_source: bool) -> None:
    if way.ray is not None and delete_source:
        raise UsageError(
            "--ray and --delete-source-as-you-go: nodes read a checkpoint that stays where it is.",
            "Leave one of them out.",
        )


def _planned(conversion: Conversion, layout: LayoutOptions) -> Result:
    plan = conversion.plan
    rank = {
        "weight_bytes": plan.rank_bytes,
        "kv_bytes_per_token": kv_bytes_per_token(plan.sizes, plan.mesh, plan.dtype),
    }
    return Result(
        {
            "ranks": [rank for _ in plan.mesh.ranks],
            "download_bytes": conversion.download_bytes,
            "quant": plan.quant,
            "output_bytes": plan.output_bytes,
            "peak_memory_bytes": conversion.planned_memory_bytes,
        },
        lines=[f"Nothing was written. Output would be {conversion.output}."],
        next=convert_command(layout.tp, layout.ep),
    )
