"""Answers of commands, and errors: one JSON object with --json, text without.

Nothing else asks which of the two it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from msconv_runtime.errors import MsconvError

from .console import colour, indented, is_verbose, say, visible
from .typed import Mistyped

JSON = "msconv.json"  # in a context's meta: whether --json was given
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

AFTER_INTERRUPT = {  # by the command
    "": "Nothing was changed; run the same command again.",
    "convert": "Run the same command again: the conversion resumes where it was.",
    "reshard": "Run the same command again: it resumes where it was.",
    "push": "Run the same command again: what was uploaded is kept.",
    "pull": "Run the same command again: what was downloaded is kept.",
    "compile": "The artifact is whole, with the graphs that it had or the new ones; run the same command again.",
    "verify": "The artifact is as it was; run the same command again: a proof begins anew.",
    "rehearse": "Its servers were ended, the artifact is as it was; run the same command again.",
    "serve": "No server was started.",
}
_running = ""  # the command, for what is said after it was interrupted

json_option = click.option(
    "--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print one JSON object on stdout."
)


@dataclass(frozen=True)
class Result:
    """Answer of a command.

    `data`: the object of --json, or what makes it where that takes work.  `text`: on stdout without --json;
    `verbatim`: the same, printed as it is: a script, or text with colours whose names are visible already.
    `lines`: on stderr in both modes.  `failure`: the answer is a no, and this its exit code and message, which
    --json leaves out: `data` says why.  `next`: what to do next, on stderr, after a yes.
    """

    data: dict[str, Any] | Callable[[], dict[str, Any]]
    text: str = ""
    verbatim: str = ""
    lines: Sequence[str] = ()
    failure: MsconvError | None = None
    next: str = ""


def show(result: Result) -> None:
    """Print a result the way it was asked for.  Raises its failure, or click's Exit with the failure's code."""
    as_json = is_json_asked()
    if as_json:
        _emit(result.data() if callable(result.data) else result.data)
    elif result.text or result.verbatim:
        click.echo(visible(result.text) or result.verbatim)
    for line in result.lines:
        say(line)
    if result.failure and as_json:
        raise click.exceptions.Exit(result.failure.exit_code)
    if result.failure:
        raise result.failure
    if result.next:
        say(f"Next: {result.next}")


def take_json(ctx: click.Context) -> None:
    """Keep --json for `show`: commands are not told.  And the command's name, for `report`."""
    global _running
    _running = ctx.command.name or ""
    ctx.meta[JSON] = ctx.params.pop("as_json", False)


def is_json_asked() -> bool:
    """Whether --json was given.  For a command that does less with it; what is printed is `show`'s to decide."""
    return bool(click.get_current_context().meta[JSON])


def _emit(data: dict[str, Any]) -> None:
    click.echo(json.dumps(_finite(data), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    """The same, with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(error: BaseException) -> int:
    """Print an error the way the process's arguments ask for.  Returns the exit code."""
    code, message, hint, exit_code = _explain(error)
    if code == "internal" and is_verbose():
        click.echo(visible("".join(traceback.format_exception(error))), err=True)
    hint = hint or NEXT.get(code, "")
    if "--json" in sys.argv:
        with contextlib.suppress(OSError):
            _emit({"error": {"code": code, "message": message, "hint": hint}})
    click.echo(click.style("Error: ", fg="red", bold=True) + indented(message), err=True, color=colour())
    if hint:
        click.echo(click.style("Next: ", fg="yellow") + indented(hint), err=True, color=colour())
    return exit_code


def _explain(error: BaseException) -> tuple[str, str, str, int]:
    """Code, message, hint ("" for the code's own) and exit code of an error."""
    if isinstance(error, MsconvError):
        return error.code, error.message, error.hint, error.exit_code
    if isinstance(error, click.ClickException):
        return "usage", error.format_message(), _usage_hint(error), 2
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", "Interrupted.", AFTER_INTERRUPT.get(_running, AFTER_INTERRUPT[""]), INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE):
        message = f"The answer could not be written: {error.strerror}."
        return "resource", message, "Check where stdout goes.", 5
    if "TORCH_DEVICE_BACKEND_AUTOLOAD" in str(error):  # torch's own words, where a device's package fails
        hint = "Without a device `export TORCH_DEVICE_BACKEND_AUTOLOAD=0`; with one install what is missing."
        return "environment", f"torch cannot be imported: {error}", hint, 4
    if isinstance(error, MemoryError):
        return "resource", "Out of memory.", "Try a lower --max-memory or --jobs 1.", 5
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
    hint = f"This is a fault in msconv{where}. Please report it with the command you ran."
    return "internal", f"{type(error).__name__}: {error}", hint, 1


def _usage_hint(error: click.ClickException) -> str:
    if isinstance(error, Mistyped):
        return error.hint
    if isinstance(error, click.MissingParameter) and error.param and error.param.name == "tp":
        return "How many ranks?  Give --tp N, or a recipe that says it: `msconv recipes` lists them."
    if isinstance(error, click.MissingParameter) and error.param and error.param.name == "model":
        return "Which model?  A directory, owner/name on a hub, or a recipe: `msconv recipes` lists them."
    if isinstance(error, click.UsageError) and error.ctx:
        return f"`{error.ctx.command_path} --help` shows how."
    return ""
