"""`msconv convert`: a checkpoint becomes an artifact."""

from __future__ import annotations

import shlex

import click

from msconv_runtime.artifact import Artifact
from msconv_runtime.errors import UsageError
from msconv_runtime.units import human_bytes

from ..checkpoint.urls import require_driver
from ..layout.memory import kv_bytes_per_token
from ..location import open_reference
from ..steps.conversion import Conversion
from ..workspace.clearing import clear_uploaded
from ..workspace.lock import exclusive
from .command import Command
from .console import byte_progresses, say
from .conversion import LayoutOptions, converted, layout_options, say_plan
from .here import quoted
from .moving import Way, ray_option, way_to_move
from .references import convert_command, recipe_argument
from .report import refresh
from .result import Result, json_option, show


@click.command("convert", cls=Command)
@layout_options(
    "Directory of a checkpoint, owner/name[@revision], an address (s3://, https://), or a recipe's name.",
    "A directory, or s3://bucket/name.  [default: artifacts/<model>-tp<N>[-ep<M>]]",
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
    msconv convert --model s3://bucket/models/Qwen3-8B --tp 4 --output s3://bucket/artifacts/Qwen3-8B-tp4
    msconv convert --model /shared/DeepSeek-V3 --tp 16 --ep 16 --output /shared/out --ray auto
    """
    from ..steps import conversion as steps
    from ..steps.convert import prepare

    way = way_to_move(ray, layout.num_jobs)
    _refuse_both(way, delete_source, layout.store or "")
    conversion = prepare(
        open_reference(layout.model, layout.hub),
        layout.tp,
        layout.ep,
        layout.dtype,
        layout.directory,
        layout.num_jobs,
        layout.max_memory,
        delete_source,
        layout.harmless,
        layout.quant,
        not layout.no_drafts,
        way.besides,
    )
    say_plan(conversion)
    if dry_run:
        show(_planned(conversion, layout))
        return
    if layout.store:
        require_driver(layout.store)
        _convert_into(layout.store, conversion, force)
        return
    bars = {"downloading": conversion.download_bytes, "converting": conversion.plan.read_bytes}
    with way.mover(conversion.planned_memory_bytes) as mover, byte_progresses(bars) as advance:
        done = steps.run(conversion, force, advance["converting"], advance["downloading"], refresh, mover)
    show(converted(done, [], f"msconv compile {quoted(done.artifact)}{recipe_argument()}"))


def _convert_into(url: str, conversion: Conversion, force: bool) -> None:
    """Convert on this machine, upload, and leave nothing here."""
    from ..share import upload
    from ..steps import conversion as steps

    local = conversion.output
    following = (
        f"aws s3 cp --recursive {shlex.quote(url)} artifacts/{local.name}  # then compile, verify, serve there"
    )
    if upload.is_uploaded(url, conversion.identity.digest(), force):
        show(converted(steps.nothing_done(conversion), [], following, url))
        return
    say(f"Written to {local} first, which needs {human_bytes(conversion.plan.output_bytes)} until it is uploaded.")
    bars = {"downloading": conversion.download_bytes, "converting": conversion.plan.read_bytes}
    with byte_progresses({**bars, "uploading": conversion.plan.output_bytes}) as advance:
        done = steps.run(conversion, force, advance["converting"], advance["downloading"], refresh)
        with exclusive(local):
            sent = upload.upload(local, Artifact(local).manifest, url, force, advance["uploading"])
            clear_uploaded(local)
    line = f"Uploaded: {url}, {sent.files} files, sent {human_bytes(sent.nbytes)} in {sent.seconds:.1f} s"
    show(converted(done, [line], following, url))


def _refuse_both(way: Way, delete_source: bool, store: str) -> None:
    if way.ray is not None and delete_source:
        raise UsageError(
            "--ray and --delete-source-as-you-go: nodes read a checkpoint that stays where it is.",
            "Leave one of them out.",
        )
    if way.ray is not None and store:
        raise UsageError(
            f"--ray and --output {store}: nodes write into a directory that they share.",
            "Convert into such a directory, then copy it; or leave out --ray.",
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
        lines=[f"Nothing was written. Output would be {layout.store or conversion.output}."],
        next=convert_command(layout.tp, layout.ep),
    )
