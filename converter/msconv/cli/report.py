"""`msconv report`: the page that people look at."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from msconv_runtime.artifact import SIGNATURE, Manifest
from msconv_runtime.errors import UsageError

from .command import Command
from .console import find_artifact, say
from .here import quoted
from .options import artifact_argument, output_option
from .result import Result, is_json_asked, json_option, show
from .sign import stale


@click.command("report", cls=Command)
@artifact_argument
@output_option("Another file.  [default: ARTIFACT/report.html]")
@json_option
def command(artifact: Path | None, output: Path | None) -> None:
    """Write report.html: proof, memory, coverage and graphs on one page that works offline.

    convert, reshard, compile and verify do so by themselves.  --json prints what the page says as data, and
    writes a page only where --output says.

    \b
    msconv report artifacts/Qwen3-8B-tp4
    msconv report artifacts/Qwen3-8B-tp4 --output Qwen3-8B.html
    """
    from ..report.page import facts

    root = find_artifact(artifact)
    data = partial(facts, root)
    if is_json_asked() and output is None:
        show(Result(data, next=f"msconv report {quoted(root)}  # writes the page"))
        return
    path = _write(root, output)
    show(Result(data, str(path), next=f"xdg-open {quoted(path)}  # or any browser"))


def _write(root: Path, output: Path | None) -> Path:
    """Write the page.  Raises UsageError or ResourceError where that cannot be."""
    from ..report.page import write_report
    from ..workspace.disk import disk_error

    try:
        return write_report(root, output=output)
    except (IsADirectoryError, FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{output or root}: no file can be written there.", "Give --output a file in a directory that exists."
        ) from None
    except OSError as e:
        raise disk_error(e, root, 0) from None


def refresh(root: Path, manifest: Manifest | None = None) -> None:
    """Bring report.html up to date, at the end of a command, and say if that made a signature stale.  A failure is
    a warning and no more.  `manifest`: the one that is about to be written."""
    try:
        from ..report.page import write_report

        write_report(root, manifest)
    except Exception as e:  # whatever it is: no page is worth a conversion
        say(f"Warning: {root / 'report.html'} was not written: {getattr(e, 'message', '') or e}")
        say(f"`msconv report {root}` tries again.")
    if manifest is None and stale(root):
        say(f"{root}: {SIGNATURE} is for the artifact as it was: `msconv sign {root} --key KEY` signs it again.")
