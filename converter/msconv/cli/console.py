"""What commands share: printing, progress, sizes, finding the artifact, and turning errors into exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from msconv_runtime.artifact import is_artifact
from msconv_runtime.dtypes import VALUE_DTYPES
from msconv_runtime.errors import MsconvError, UsageError

ARTIFACTS = Path("artifacts")
INTERRUPTED = 130

NEXT = {  # after an error that has no hint of its own, by its code
    "usage": "`msconv --help` lists the commands; each has --help with examples.",
    "checkpoint": "Download the checkpoint again.",
    "plan": "`msconv plan --model REF --tp N` tries another layout without writing anything.",
    "artifact": "`msconv inspect ARTIFACT --check` names what is damaged.",
    "verification": "`msconv inspect ARTIFACT --check` tells whether bytes were damaged since.",
    "environment": "`msconv doctor` says what this machine lacks.",
    "resource": "`msconv plan --model REF --tp N` says what a conversion needs.",
    "busy": "Wait until it has finished, or give another --output.",
}


class Volume(IntEnum):
    """How much is said on stderr."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


_volume = Volume.NORMAL


def set_volume(volume: Volume) -> None:
    """Raises UsageError for --quiet and --verbose at a time.  NORMAL begins anew."""
    global _volume
    if {volume, _volume} == {Volume.QUIET, Volume.VERBOSE}:
        raise UsageError("--quiet and --verbose: one or the other.", "Leave one of them out.")
    _volume = volume


def is_verbose() -> bool:
    return _volume is Volume.VERBOSE


def _shows_progress() -> bool:
    return _volume > Volume.QUIET and sys.stderr.isatty()


def colour() -> bool | None:
    """For click: False, none; None, on a terminal only (https://no-color.org)."""
    return False if os.environ.get("NO_COLOR") else None


json_option = click.option(
    "--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print one JSON object on stdout."
)


def visible(text: str, keep: str = "\n") -> str:
    """Text in which what is not printable is written out, as `\\x1b`, but for `keep`: names come from checkpoints
    and artifacts of others, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def _indented(text: str) -> str:
    """Visible, and only its first line begins where our own words do: no name can add a `Next:`."""
    return re.sub(r"\n(?! )", "\n  ", visible(text))


def show(text: str) -> None:
    """For people who asked for it: stdout."""
    click.echo(visible(text))


def say(text: str = "") -> None:
    """For people: stderr, unless --quiet."""
    if _volume > Volume.QUIET:
        click.echo(visible(text), err=True)


class _Heard(logging.Handler):
    """Says what the runtime warns of."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.capitalize()}: {record.getMessage()}")


def hear_warnings() -> None:
    """Let the runtime's warnings be said, once in a process."""
    logger = logging.getLogger("msconv_runtime")
    logger.handlers[:] = [_Heard(logging.WARNING)]
    logger.propagate = False


def emit(data: dict[str, Any]) -> None:
    """For programs: one JSON object on stdout."""
    click.echo(json.dumps(data, indent=1))


def report(error: BaseException, as_json: bool) -> int:
    """Print an error the way it was asked for.  Returns the exit code."""
    if isinstance(error, MsconvError):
        code, message, hint, exit_code = error.code, error.message, error.hint, error.exit_code
    elif isinstance(error, click.ClickException):
        code, message, hint, exit_code = "usage", error.format_message(), "", 2
        if isinstance(error, click.UsageError) and error.ctx:
            hint = f"`{error.ctx.command_path} --help` shows how."
        if isinstance(error, click.MissingParameter) and error.param and error.param.name == "tp":
            hint = "How many ranks?  Give --tp N, or a recipe that says it: `msconv recipes` lists them."
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        code, message, exit_code = "interrupted", "Interrupted.", INTERRUPTED
        hint = "Run the same command again: a conversion, a push or a pull resumes."
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE):
        code, exit_code = "resource", 5
        message, hint = f"The answer could not be written: {error.strerror}.", "Check where stdout goes."
    elif "TORCH_DEVICE_BACKEND_AUTOLOAD" in str(error):  # torch's own words, where a device's package fails
        code, exit_code = "environment", 4
        message = f"torch cannot be imported: {error}"
        hint = "Without a device `export TORCH_DEVICE_BACKEND_AUTOLOAD=0`; with one install what is missing."
    elif isinstance(error, MemoryError):
        code, message, hint, exit_code = (
            "resource",
            "Out of memory.",
            "Try a lower --max-memory or --jobs 1.",
            5,
        )
    else:
        code, exit_code = "internal", 1
        message = f"{type(error).__name__}: {error}"
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
        hint = f"This is a fault in msconv{where}. Please report it with the command you ran."
        if is_verbose():
            click.echo(visible("".join(traceback.format_exception(error))), err=True)
    hint = hint or NEXT.get(code, "")
    if as_json:
        with contextlib.suppress(OSError):
            emit({"error": {"code": code, "message": message, "hint": hint}})
    click.echo(click.style("Error: ", fg="red", bold=True) + _indented(message), err=True, color=colour())
    if hint:
        click.echo(click.style("Next: ", fg="yellow") + _indented(hint), err=True, color=colour())
    return exit_code


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
    """Several of them, one below the other, by their labels.  Those of nothing are not shown."""
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


def human(n: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError


class Size(click.ParamType[int]):
    """A number of bytes: 512M, 2GiB, 1000000."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower().removesuffix("ib").removesuffix("b")
        scale = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(text[-1:], 1)
        try:
            number = float(text[:-1] if scale > 1 else text)
        except ValueError:
            self.fail(f"{value!r} is not a size; write 512M or 2G.", param, ctx)
        if not 0 < number * scale < 1 << 60:
            self.fail(f"{value!r} is out of range.", param, ctx)
        return int(number * scale)


tp_option = click.option("--tp", required=True, type=click.IntRange(1, 1024), help="Tensor-parallel ranks.")
ep_option = click.option(
    "--ep", default=1, show_default=True, type=click.IntRange(1, 1024), help="Expert-parallel ranks."
)
dtype_option = click.option(
    "--dtype", type=click.Choice(VALUE_DTYPES), help="Element type.  [default: the checkpoint's]"
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(1, 64), help="Worker threads.  [default: 2, or 1 on one core]"
)
memory_option = click.option("--max-memory", type=Size(), help="Ceiling on memory, for example 512M.")


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


def complete_artifacts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Those in artifacts/, and the shell's own directories."""
    found = sorted(str(p) for p in ARTIFACTS.glob("*") if is_artifact(p))
    items = [CompletionItem(name) for name in found if name.startswith(incomplete)]
    return [*items, CompletionItem(incomplete, type="dir")]


def complete_targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from msconv_runtime.targets import TARGETS

    return [CompletionItem(target) for target in TARGETS if target.startswith(incomplete)]


artifact_argument = click.argument(
    "artifact", required=False, type=click.Path(path_type=Path), shell_complete=complete_artifacts
)
