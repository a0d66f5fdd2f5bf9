"""`msconv pull`: an artifact comes from a hub."""

from __future__ import annotations

from pathlib import Path

import click

from .command import Command
from .console import byte_progresses, emit, human, json_option, say
from .inspect import next_command
from .report import refresh


@click.command("pull", cls=Command)
@click.argument("repository")
@click.option("--output", type=click.Path(path_type=Path), help="[default: artifacts/<name>]")
@json_option
def command(repository: str, output: Path | None, as_json: bool) -> None:
    """Download an artifact from a repository of a Hugging Face hub: owner/name[@revision].

    Run again after an interruption: it goes on to the byte.  Digests of the hub are checked as bytes arrive, those
    of the manifest at the end; READY is written last.

    \b
    msconv pull me/Qwen3-8B-tp4
    msconv pull me/Qwen3-8B-tp4@main --output out
    """
    from ..share import pull
    from ..share.parts import weight_bytes

    planned = pull.prepare(repository, output)
    done_before = planned.is_done
    bars = {
        "downloading": 0 if done_before else planned.missing_bytes(),
        "checking": 0 if done_before else weight_bytes(planned.manifest),
    }
    with byte_progresses(bars) as advance:
        done = pull.run(planned, advance["downloading"], advance["checking"], refresh)
    if as_json:
        emit(
            {
                "artifact": str(done.artifact),
                "repository": done.repository,
                "commit": done.commit,
                "bytes_read": done.bytes_read,
                "files": done.files,
                "seconds": round(done.seconds, 3),
            }
        )
    say(
        f"{'Already complete' if done_before else 'Pulled'}: {done.artifact}, commit {done.commit[:12]}, "
        f"{done.files} files, downloaded {human(done.bytes_read)} in {done.seconds:.1f} s"
    )
    say(f"Next: {next_command(done.artifact, planned.manifest)}")
