"""Command, with what all of them have: --quiet and --verbose, and its values printed with where each came from."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from typing import Any

import click
from click.core import ParameterSource

from msconv_runtime.units import human_bytes

from .. import __version__
from . import console
from .options import Size
from .result import take_json
from .typed import refuse_flag

RECIPE, NOTES = "msconv.recipe", "msconv.notes"  # in a context's meta
PACKAGES = ("numpy", "click", "msgspec", "huggingface_hub", "mindspore", "torch", "transformers", "sglang")
SOURCES = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.DEFAULT: "default",
}


def _set_volume(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        console.set_volume(console.Volume[str(param.name).upper()])


quiet_option = click.option(
    *("--quiet", "-q"),
    is_flag=True,
    is_eager=True,
    allow_from_autoenv=False,
    expose_value=False,
    callback=_set_volume,
    help="Only errors, and what goes to stdout.",
)
verbose_option = click.option(
    *("--verbose", "-v"),
    is_flag=True,
    is_eager=True,
    allow_from_autoenv=False,
    expose_value=False,
    callback=_set_volume,
    help="Also versions, times, every value and where it came from.",
)


class Command(click.Command):
    """A command of msconv.  MSCONV_<COMMAND>_<FLAG> in the environment sets an option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in self.params:
            if isinstance(option, click.Option) and option.allow_from_autoenv:
                option.envvar = f"MSCONV_{self.name}{option.opts[0][1:]}".upper().replace("-", "_")
        verbose_option(quiet_option(self))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as e:
            refuse_flag(ctx, e, given)

    def invoke(self, ctx: click.Context) -> Any:
        started = time.monotonic()
        for note in ctx.meta.get(NOTES, ()):
            console.say(note)
        if console.is_verbose():
            console.say(versions())
        if values := resolved(ctx, shows_all=console.is_verbose()):
            console.say("Values: " + ", ".join(values))
        take_json(ctx)
        try:
            return super().invoke(ctx)
        finally:
            if console.is_verbose():
                console.say(f"{self.name}: {time.monotonic() - started:.2f} s")


def resolved(ctx: click.Context, shows_all: bool) -> list[str]:
    """Values as `tp 4 (recipe Qwen3-8B)`: those that the environment or a recipe set, and with a recipe all that
    it could have set.  `shows_all`: of every option that has one."""
    sources = {
        p: ctx.get_parameter_source(p.name or "") for p in ctx.command.params if isinstance(p, click.Option)
    }
    recipe = ctx.meta.get(RECIPE)
    governed = recipe.defaults() if recipe else {}
    values = []
    for param, source in sources.items():
        value = ctx.params.get(param.name or "")
        is_set = source in (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)
        if value is None or value == () or param.is_eager or not (shows_all or is_set or param.name in governed):
            continue
        place = SOURCES.get(source or ParameterSource.DEFAULT, "")
        if source is ParameterSource.ENVIRONMENT:
            place = str(param.envvar)
        elif source is ParameterSource.DEFAULT_MAP and recipe:
            place = f"recipe {recipe.name}"
        said = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if isinstance(param.type, Size):
            said = human_bytes(value)
        values.append(f"{param.opts[0].removeprefix('--')} {said} ({place})")
    return values


def versions() -> str:
    """Versions of msconv, Python and the packages that are there; none is imported."""
    found = [f"msconv {__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
