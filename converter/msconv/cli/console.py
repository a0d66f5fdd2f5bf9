"""Words, warnings and progress on stderr while a command runs; and the artifact that it is for."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from pathlib import Path

import click

from msconv_runtime.artifact import is_artifact
from msconv_runtime.errors import UsageError

ARTIFACTS = Path("artifacts")


class Volume(IntEnum):
    """Amount of what is said on stderr."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


_volume = Volume.NORMAL


def set_volume(volume: Volume) -> None:
    """Set it for this process; NORMAL begins anew.  Raises UsageError for --quiet and --verbose at a time."""
    global _volume
    if {volume, _volume} == {Volume.QUIET, Volume.VERBOSE}:
        raise UsageError("--quiet and --verbose: one or the other.", "Leave one of them out.")
    _volume = volume


def is_verbose() -> bool:
    return _volume is Volume.VERBOSE


def _shows_progress() -> bool:
    return _volume > Volume.QUIET and sys.stderr.isatty()


def colour() -> bool | None:
    """Whether click may colour: False, never; None, on a terminal only (https://no-color.org)."""
    return False if os.environ.get("NO_COLOR") else None


def visible(text: str, keep: str = "\n") -> str:
    """Write out what is not printable in a text, as `\\x1b`, but for `keep`: names come from checkpoints and
    artifacts of others, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def indented(text: str) -> str:
    """Make text visible, with only its first line where our own words begin: no name can add a `Next:`."""
    return re.sub(r"\n(?! )", "\n  ", visible(text))


def say(text: str = "") -> None:
    """Print for people, on stderr, unless --quiet."""
    if _volume > Volume.QUIET:
        click.echo(indented(text), err=True)


class _Warnings(logging.Handler):
    """Handler that says what the runtime warns of."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.capitalize()}: {record.getMessage()}")


def hear_warnings() -> None:
    """Let the runtime's warnings be said, once in a process."""
    logger = logging.getLogger("msconv_runtime")
    logger.handlers[:] = [_Warnings(logging.WARNING)]
    logger.propagate = False


def import_torch_alone() -> None:
    """Keep torch_npu out of a command that needs no device: where CANN is missing its import fails, and with it
    torch's, which loads it by itself, and transformers', which looks for it.  Call it before they are imported."""
    if os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0") == "0":
        sys.modules.setdefault("torch_npu", None)  # type: ignore[arg-type]  # None: not to be found


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes with rate and time left, on a terminal only.  Threads may call it."""
    with byte_progresses({label: total}) as advances:
        yield advances[label]


@contextmanager
def byte_progresses(totals: dict[str, int]) -> Iterator[dict[str, Callable[[int], None]]]:
    """Progress bars one below the other, by their labels.  Those of nothing are not shown."""
    if not _shows_progress():
        yield dict.fromkeys(totals, lambda n: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True)) as progress:
        tasks = {n: progress.add_task(n, total=total, visible=total > 0) for n, total in totals.items()}
        yield {label: partial(progress.advance, task) for label, task in tasks.items()}


@contextmanager
def step(label: str) -> Iterator[None]:
    """A line that says what takes time, with a spinner on a terminal."""
    if not _shows_progress():
        say(f"{label} ...")
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(visible(label))):
        yield


def find_artifact(given: Path | None) -> Path:
    """The artifact that was named, or the newest in artifacts/ (and says which)."""
    if given is not None:
        return given
    found = [p for p in ARTIFACTS.glob("*") if is_artifact(p)]
    if not found:
        raise UsageError(
            f"No artifact was named and there is none in {ARTIFACTS}/.",
            "`msconv convert --model <dir> --tp N` makes one.",
        )
    newest = max(found, key=lambda p: (p / "msconv.json").stat().st_mtime_ns)
    say(f"Artifact: {newest} (the newest in {ARTIFACTS}/)")
    return newest
