"""`msconv lint`: what is wrong with a checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from msconv_runtime.errors import CheckpointError
from msconv_runtime.units import human_bytes

from ..checkpoint.hubs import Hub
from ..location import LocalDirectory, Location, open_reference
from .command import Command
from .console import byte_progress, say, step, visible
from .options import jobs_option, worker_count
from .references import harmless_option, source_option
from .result import Result, json_option, show

if TYPE_CHECKING:
    from ..lint.findings import Finding
    from ..steps.lint import Linted


@click.command("lint", cls=Command)
@click.argument("checkpoint", metavar="CHECKPOINT")
@jobs_option
@source_option
@harmless_option
@json_option
def command(checkpoint: str, jobs: int | None, hub: Hub, harmless: tuple[str, ...]) -> None:
    """Say what is wrong with a checkpoint: names, numbers, scales and digests.

    Reads every byte once, quantised or not, and lists all there is at once.  Exit code 1 if there are errors.

    \b
    msconv lint models/DeepSeek-R1-W8A8
    msconv lint Qwen/Qwen3-8B                downloads it, then reads it
    msconv lint models/Qwen3-8B --json
    """
    from ..steps.lint import lint

    location = open_reference(checkpoint, hub)
    root = location.bring() if isinstance(location, LocalDirectory) else _bring(checkpoint, location)
    with ExitStack() as stack:
        done = lint(
            root,
            harmless,
            worker_count(jobs),
            lambda total: stack.enter_context(byte_progress("reading", total)),
        )
    for finding in done.findings:
        say(_line(finding))
    show(Result(_data(done), lines=[_summary(done)], failure=_failure(done), next=_next(checkpoint)))


def _bring(checkpoint: str, location: Location) -> Path:
    with step(f"{checkpoint}: downloading what is not here"):
        return location.bring()


def _line(finding: Finding) -> str:
    count = f" ({finding.count} tensors)" if finding.count > 1 else ""
    text = visible(f"{finding.where}{count}: {finding.problem}", keep="").replace("\\n", "\n  ")
    return f"{finding.severity}: {finding.check}: {text}"


def _summary(done: Linted) -> str:
    said = (
        f"{done.digests} of {done.shards} with a hub's digest"
        if done.digests
        else "no hub's digests to compare with"
    )
    rate = f" ({done.seconds_per_gb:.2f} s a GB)" if done.bytes_read else ""
    return (
        f"{done.root}: {done.tensors} tensors in {done.shards} shards ({said}), {human_bytes(done.bytes_read)} in "
        f"{done.seconds:.1f} s{rate}, peak memory {human_bytes(done.peak_rss_bytes)}"
    )


def _failure(done: Linted) -> CheckpointError | None:
    errors = [f for f in done.findings if f.severity == "error"]
    if not errors:
        return None
    checks = ", ".join(dict.fromkeys(f.check for f in errors))
    return CheckpointError(
        f"{done.root}: {len(errors)} errors ({checks}), listed above.",
        "Download files again whose digest or length is wrong; all else has to be quantised again.",
    )


def _next(checkpoint: str) -> str:
    return f"msconv plan --model {checkpoint} --tp 1"


def _data(done: Linted) -> dict[str, object]:
    return {
        "checkpoint": str(done.root),
        "family": done.family,
        "ok": done.is_sound,
        "findings": [asdict(finding) for finding in done.findings],
        "tensors": done.tensors,
        "shards": done.shards,
        "digests_compared": done.digests,
        "bytes_read": done.bytes_read,
        "seconds": round(done.seconds, 3),
        "seconds_per_gb": round(done.seconds_per_gb, 3),
        "peak_rss_bytes": done.peak_rss_bytes,
    }
