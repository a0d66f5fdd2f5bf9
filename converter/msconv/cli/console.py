"""Words, warnings and progress on stderr while a command runs; and the artifact that it is for."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from pathlib import Path

import click

from msconv_runtime.artifact import is_artifact
from msconv_runtime.errors import ArtifactError, UsageError
from msconv_runtime.units import human_bytes

ARTIFACTS = Path("artifacts")
REPEAT_S = 30  # between two lines of progress, where there is no terminal


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


def shows_progress() -> bool:
    """Whether people look: on a terminal, unless --quiet."""
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
    if not shows_progress():
        yield {label: _said_now_and_then(label, total) for label, total in totals.items()}
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """In the units of all else that is said."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{human_bytes(speed)}/s" if speed else "?", style="progress.data.speed")

    columns = (BarColumn(), DownloadColumn(binary_units=True), Rate(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True)) as progress:
        tasks = {n: progress.add_task(n, total=total, visible=total > 0) for n, total in totals.items()}
        yield {label: partial(progress.advance, task) for label, task in tasks.items()}


def _said_now_and_then(label: str, total: int) -> Callable[[int], None]:
    """A line every REPEAT_S seconds: for logs.  Threads may call it."""
    lock, done = threading.Lock(), 0
    started = last = time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, last
        with lock:
            done, now = done + n, time.monotonic()
            if now - last < REPEAT_S or not total:
                return
            last = now
            left = (now - started) / max(done, 1) * (total - done)
            say(f"  {label}: {human_bytes(done)} of {human_bytes(total)}, about {left:.0f} s left")

    return advance


@contextmanager
def step(label: str) -> Iterator[None]:
    """A line that says what takes time, with a spinner on a terminal."""
    if not shows_progress():
        say(f"{label} ...")
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(visible(label))):
        yield


def _named(given: Path) -> Path:
    """Raises ArtifactError with near names where there is no such directory, UsageError if several are meant."""
    name = str(given)
    if len(given.parts) != 1 or name.startswith((".", "-")) or os.path.lexists(given):
        return given
    there = sorted(p.name for p in ARTIFACTS.glob("*") if is_artifact(p))
    meant = [n for n in there if n == name] or [n for n in there if n.startswith(f"{name}-tp")]
    if len(meant) == 1:
        say(f"Artifact: {ARTIFACTS / meant[0]}")
        return ARTIFACTS / meant[0]
    if meant:
        raise UsageError(
            f"{name}: {len(meant)} artifacts are of this model.", f"Name one: {', '.join(meant[:8])}."
        )
    near = difflib.get_close_matches(name, there, 3)
    if near:
        where = f"no such directory, here or in {ARTIFACTS}/"
        raise ArtifactError(f"{name}: {where}.", f"Did you mean {' or '.join(near)}?")
    return given


def find_artifact(given: Path | None) -> Path:
    """The artifact that was named, or the newest in artifacts/ (and says which).  A name without a directory is
    looked for in artifacts/, and so is a model's: `Qwen3-8B` of `artifacts/Qwen3-8B-tp4`."""
    if given is not None:
        return _named(given)
    found = [p for p in ARTIFACTS.glob("*") if is_artifact(p)]
    if not found:
        raise UsageError(
            f"No artifact was named and there is none in {ARTIFACTS}/.",
            "`msconv convert DIR --tp N` makes one, DIR being a checkpoint; `msconv recipes` has examples.",
        )
    newest = max(found, key=lambda p: (p / "msconv.json").stat().st_mtime_ns)
    say(f"Artifact: {newest} (the newest in {ARTIFACTS}/)")
    return newest
