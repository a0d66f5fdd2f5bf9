"""`msconv pull`: an artifact comes from a hub."""

from __future__ import annotations

from pathlib import Path

import click

from msconv_runtime.units import human_bytes

from ..checkpoint.client import require_client
from .command import Command
from .console import byte_progresses
from .inspect import next_command
from .options import output_option, signature_option
from .report import refresh
from .result import Result, json_option, show
from .sign import signed_line


@click.command("pull", cls=Command)
@click.argument("repository")
@output_option("[default: artifacts/<name>]")
@signature_option
@json_option
def command(repository: str, output: Path | None, require_signature: Path | None) -> None:
    """Download an artifact from a repository of a Hugging Face hub: owner/name[@revision].

    Run again after an interruption: it goes on to the byte.  Digests of the hub are checked as bytes arrive, those
    of the manifest at the end; READY is written last.

    \b
    msconv pull me/Qwen3-8B-tp4
    msconv pull me/Qwen3-8B-tp4@main --output out
    msconv pull me/Qwen3-8B-tp4 --require-signature me.pub
    """
    require_client("msconv pull")
    from ..share import pull
    from ..share.parts import weight_bytes

    planned = pull.prepare(repository, output, require_signature)
    was_complete = planned.is_done
    bars = {
        "downloading": 0 if was_complete else planned.missing_bytes(),
        "checking": 0 if was_complete else weight_bytes(planned.manifest),
    }
    with byte_progresses(bars) as advance:
        done = pull.run(planned, advance["downloading"], advance["checking"], refresh)
    verb = "Already complete" if was_complete else "Pulled"
    show(
        Result(
            {
                "artifact": str(done.artifact),
                "repository": done.repository,
                "commit": done.commit,
                "bytes_read": done.bytes_read,
                "files": done.files,
                "seconds": round(done.seconds, 3),
            },
            lines=[
                f"{verb}: {done.artifact}, commit {done.commit[:12]}, {done.files} files, "
                f"downloaded {human_bytes(done.bytes_read)} in {done.seconds:.1f} s",
                *signed_line(require_signature),
            ],
            next=next_command(done.artifact, planned.manifest),
        )
    )
