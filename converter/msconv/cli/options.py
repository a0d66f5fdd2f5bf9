"""Options and arguments that commands share, and what they are completed with."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from msconv_runtime.artifact import is_artifact
from msconv_runtime.dtypes import QUANT, VALUE_DTYPES
from msconv_runtime.errors import UsageError

from ..checkpoint.urls import StoreUrl, checked_url, is_url, scheme_of, without_secrets
from .console import ARTIFACTS
from .typed import DTYPES_ELSEWHERE, Spelled

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


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


class UserPath(click.Path):
    """A path in which `~` is the user's home, also where no shell has seen it: `--output=~/x`, a variable.  One
    that is empty would be the current directory, and is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if not str(value):
            option = param.opts[-1] if param and param.opts[-1].startswith("-") else "the path"
            raise UsageError(f"{option}: is empty: a path is needed.", "For the current directory, write a dot.")
        if is_url(str(value)) and not os.path.lexists(value):
            raise _elsewhere(str(value))
        return super().convert(at_home(value), param, ctx)


class OutputPlace(UserPath):
    """A path, or the address of a directory in a store that takes artifacts."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if not is_url(str(value)) or os.path.lexists(value):
            return super().convert(value, param, ctx)
        if scheme_of(str(value)) != "s3":
            raise UsageError(
                f"{without_secrets(str(value))}: artifacts are uploaded to s3:// only.",
                "Give s3://bucket/name, or a directory.",
            )
        return StoreUrl(checked_url(str(value)))


def _elsewhere(url: str) -> UsageError:
    said = without_secrets(url)
    return UsageError(
        f"{said}: is the address of a store: here a directory of this machine is needed.",
        "Mount the store, or download it: aws s3 cp --recursive " + said + " DIR.",
    )


def at_home(value: Any) -> Any:
    """Put the user's home for a leading `~`."""
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    return os.path.expanduser(value)  # noqa: PTH111  # Path's raises where there is no such user


class Finite(click.FloatRange):
    """A range that takes neither infinity nor what is no number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is no finite number.", param, ctx)
        return found


def grouped(name: str, make: Callable[..., Any], *options: Decorator) -> Decorator:
    """Options whose values a command gets as one argument: `name`, made of them by `make`, by their names."""

    def no_command() -> None: ...

    for option in options:
        option(no_command)
    params: list[click.Parameter] = no_command.__click_params__  # type: ignore[attr-defined]
    taken = [p.name for p in params if p.name and p.expose_value]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(**values: Any) -> Any:
            made = make(**{option: values.pop(option) for option in taken})
            return command(**values, **{name: made})

        for option in reversed(options):
            option(call)
        return call

    return decorate


def worker_count(jobs: int | None) -> int:
    """The threads that --jobs asks for."""
    return jobs or min(2, os.cpu_count() or 1)


def parted_from_flags(artifact: Path | None, sglang_args: tuple[str, ...]) -> tuple[Path | None, list[str]]:
    """Take ARTIFACT and what follows apart: of `msconv serve -- --flag` click makes the flag ARTIFACT."""
    if artifact is not None and str(artifact).startswith("-"):
        return None, [str(artifact), *sglang_args]
    return artifact, list(sglang_args)


def complete_artifacts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Artifacts in artifacts/, and the shell's own directories."""
    found = sorted(str(p) for p in ARTIFACTS.glob("*") if is_artifact(p))
    items = [CompletionItem(name) for name in found if name.startswith(incomplete)]
    return [*items, CompletionItem(incomplete, type="dir")]


def complete_targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of targets."""
    from msconv_runtime.targets import TARGETS

    return [CompletionItem(target) for target in TARGETS if target.startswith(incomplete)]


def _choose_engine(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Make it the one that all parts of this command ask."""
    if value is None or ctx.resilient_parsing:
        return
    from msconv_runtime.serving.engine import CHOICE, engine_named

    engine_named(value)
    before = os.environ.get(CHOICE)
    os.environ[CHOICE] = value
    ctx.call_on_close(lambda: os.environ.pop(CHOICE) if before is None else os.environ.update({CHOICE: before}))


def complete_engines(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of serving engines."""
    from msconv_runtime.serving.engine import engine_names

    return [CompletionItem(name) for name in engine_names() if name.startswith(incomplete)]


engine_option = click.option(
    "--engine",
    metavar="NAME",
    is_eager=True,  # a recipe's flags are an engine's
    allow_from_autoenv=False,
    expose_value=False,
    callback=_choose_engine,
    shell_complete=complete_engines,
    help="Who serves: sglang, or vllm on a CPU.  [default: sglang, or MSCONV_ENGINE]",
)
artifact_argument = click.argument("artifact", required=False, type=UserPath(), shell_complete=complete_artifacts)
tp_option = click.option("--tp", required=True, type=click.IntRange(1, 1024), help="Tensor-parallel ranks.")
ep_option = click.option(
    "--ep", default=1, show_default=True, type=click.IntRange(1, 1024), help="Expert-parallel ranks."
)
dtype_option = click.option(
    "--dtype", type=Spelled(VALUE_DTYPES, DTYPES_ELSEWHERE), help="Element type.  [default: the checkpoint's]"
)
quant_option = click.option(
    "--quant",
    type=click.Choice(list(QUANT)),
    help="Quantise the layers' matrices: w8a8, int8 with a scale a token.  [default: as stored]",
)
no_drafts_option = click.option(
    "--no-drafts",
    is_flag=True,
    help="Leave out the layer of multi-token prediction, which guesses tokens for speculative decoding.",
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(1, 64), help="Worker threads.  [default: 2, or 1 on one core]"
)
memory_option = click.option("--max-memory", type=Size(), help="Ceiling on memory, for example 512M.")
reference_option = click.option(
    "--reference",
    metavar="REF",
    callback=lambda ctx, param, value: at_home(value),
    help="The source checkpoint: a directory or owner/name[@revision].  [default: where it was converted from]",
)


signature_option = click.option(
    "--require-signature",
    metavar="PUBKEY",
    type=click.Path(path_type=Path),
    help="Refuse an artifact that the owner of this public key (PEM) has not signed as it is.",
)


def output_option(text: str, place: UserPath | None = None) -> Decorator:
    """Option --output, explained by `text`.  `place`: what is taken, by default a path."""
    return click.option("--output", type=place or UserPath(), help=text)
