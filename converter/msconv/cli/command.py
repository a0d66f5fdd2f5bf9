"""What every command has: --quiet and --verbose, and its values printed with where each came from."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from typing import Any

import click
from click.core import ParameterSource

from .. import __version__
from . import console

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

    def invoke(self, ctx: click.Context) -> Any:
        started = time.monotonic()
        for note in ctx.meta.get(NOTES, ()):
            console.say(note)
        if console.is_verbose():
            console.say(versions())
        if values := resolved(ctx, console.is_verbose()):
            console.say("Values: " + ", ".join(values))
        try:
            return super().invoke(ctx)
        finally:
            if console.is_verbose():
                console.say(f"{self.name}: {time.monotonic() - started:.2f} s")


def resolved(ctx: click.Context, everything: bool) -> list[str]:
    """`tp 4 (recipe Qwen3-8B)` of each option that the environment or a recipe set, or has its turn to: of all of
    them if there is a recipe.  `everything`: of all there are."""
    sources = {
        p: ctx.get_parameter_source(p.name or "") for p in ctx.command.params if isinstance(p, click.Option)
    }
    recipe = ctx.meta.get(RECIPE)
    governed = recipe.defaults() if recipe else {}
    values = []
    for param, source in sources.items():
        value = ctx.params.get(param.name or "")
        elsewhere = source in (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)
        if (
            value is None
            or value == ()
            or param.is_eager
            or not (everything or elsewhere or param.name in governed)
        ):
            continue
        place = SOURCES.get(source or ParameterSource.DEFAULT, "")
        if source is ParameterSource.ENVIRONMENT:
            place = str(param.envvar)
        elif source is ParameterSource.DEFAULT_MAP and recipe:
            place = f"recipe {recipe.name}"
        said = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if isinstance(param.type, console.Size):
            said = console.human(value)
        values.append(f"{param.opts[0].removeprefix('--')} {said} ({place})")
    return values


def versions() -> str:
    """msconv's, Python's, and those of the packages that are there; none is imported."""
    found = [f"msconv {__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
