"""Options --model, --source and --recipe: from a name to what is meant by it.  A recipe's values become defaults
of the command's other options, so that flags and the environment come before them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from msconv_runtime.artifact import Manifest
from msconv_runtime.errors import UsageError
from msconv_runtime.serving.flags import given_flags

from ..checkpoint.hubs import HUBS
from ..recipes import NAME, Recipe, all_recipes, find_recipe, near_names
from .command import NOTES, RECIPE
from .console import say
from .options import at_home

LAYOUT = ("tp", "ep")
TYPED, FIRST = "msconv.model", "msconv.first"  # in a context's meta


def complete_recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in all_recipes() if name.casefold().startswith(incomplete.casefold())]


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Recipes, and the shell's own directories."""
    return [*complete_recipes(ctx, param, incomplete), CompletionItem(incomplete, type="dir")]


def used_recipe() -> Recipe | None:
    """The recipe that this command takes values from."""
    found: Recipe | None = click.get_current_context().meta.get(RECIPE)
    return found


def convert_command(tp: int, ep: int) -> str:
    """Command `msconv convert` of what --model was typed as: for hints."""
    ctx = click.get_current_context()
    typed = ctx.meta[TYPED]
    words = ["msconv", "convert", "--model", typed, "--tp", str(tp), *(("--ep", str(ep)) if ep > 1 else ())]
    for name, flag in (("dtype", "--dtype"), ("quant", "--quant"), ("hub", "--source")):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            words += [flag, str(ctx.params[name])]
    words += ["--no-drafts"] if ctx.params.get("no_drafts") else []
    words += [word for key in ctx.params.get("harmless", ()) for word in ("--harmless", key)]
    return shlex.join(words) + (recipe_argument() if typed == ctx.params["model"] else "")


def recipe_argument() -> str:
    """Argument ` --recipe NAME` for the next command, "" without a recipe."""
    recipe = used_recipe()
    return f" --recipe {reference(recipe)}" if recipe else ""


def reference(recipe: Recipe) -> str:
    """Name of a recipe on the command line: its own, or its file if that is in no known place."""
    return recipe.name if all_recipes().get(recipe.name) == Path(recipe.path) else shlex.quote(recipe.path)


def compare_layout(manifest: Manifest) -> None:
    """Say so if the artifact is not laid out as the recipe is sized for."""
    recipe, parallel = used_recipe(), manifest.parallel
    if recipe and (recipe.tp, recipe.ep) != (parallel.tp, parallel.ep):
        say(
            f"Warning: recipe {recipe.name} is sized for tp {recipe.tp}, ep {recipe.ep}; this artifact has "
            f"tp {parallel.tp}, ep {parallel.ep}."
        )


def with_serve_flags(device: str, given: list[str]) -> list[str]:
    """The recipe's flags for the engine, if this is the device they are sized for, then `given`, which win."""
    recipe = used_recipe()
    if recipe is None:
        return given
    if recipe.device != device:
        say(
            f"Recipe {recipe.name} is sized for {recipe.devices.kind}: on --device {device} its serve flags "
            "are not used."
        )
        return given
    named = given_flags(given)
    added = {flag: value for flag, value in recipe.serve_flags().items() if flag not in named}
    if added:
        say(
            "Values: "
            + ", ".join(f"{flag} {value}".strip() for flag, value in added.items())
            + f" (recipe {recipe.name})"
        )
    return [word for pair in added.items() for word in pair if word] + given


def _need_model(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    found = _resolve_model(ctx, param, value)
    if found is None and not ctx.resilient_parsing:
        raise click.MissingParameter(ctx=ctx, param=param)
    return found


def _resolve_model(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if ctx.resilient_parsing:
        return value
    value, given = at_home(value), ctx.meta.get(FIRST)
    if given and (value is None or ctx.get_parameter_source("model") is not ParameterSource.COMMANDLINE):
        return str(given)  # the word without a flag comes before the environment
    if given:
        raise UsageError(f"{ctx.meta[TYPED]} and --model {value}: two models.", "Give one of them.")
    if value is None:
        return None
    return _resolved(ctx, value)


def _take_first(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A model without a flag.  What is on the command line is processed in its order: --model may have been."""
    if value is None or ctx.resilient_parsing:
        return value
    if TYPED in ctx.meta:
        raise UsageError(f"--model {ctx.meta[TYPED]} and {value}: two models.", "Give one of them.")
    ctx.meta[FIRST] = _resolved(ctx, at_home(value))
    return value


def _resolved(ctx: click.Context, value: str) -> str:
    """What a name stands for: of a recipe, what it pulls."""
    ctx.meta[TYPED] = value
    recipe = None
    if value.endswith((".yaml", ".yml")) or (NAME.fullmatch(value) and not Path(value).exists()):
        recipe = find_recipe(value)
        if recipe is None:
            raise unknown(value, "no such directory, and no recipe has this name")
    elif value in all_recipes():
        note = f"{value}: the directory of this name is taken; --recipe {value} adds the values of the recipe."
        ctx.meta.setdefault(NOTES, []).append(note)
    _use(ctx, recipe)
    return recipe.source if recipe else value


def _resolve_recipe(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None or ctx.resilient_parsing:
        return
    recipe = find_recipe(value)
    if recipe is None:
        raise unknown(value, "no recipe has this name")
    _use(ctx, recipe)


def _use(ctx: click.Context, recipe: Recipe | None) -> None:
    """Make a recipe's values defaults.  --model and --recipe may come in any order; without --model an
    artifact is what the command is about, and has a layout."""
    known = ctx.meta.get(RECIPE)
    if recipe and known and recipe != known:
        raise UsageError(f"{known.name} and {recipe.name}: two recipes.", "Give one of them.")
    if recipe := recipe or known:
        ctx.meta[RECIPE] = recipe
        values = {k: v for k, v in recipe.defaults().items() if TYPED in ctx.meta or k not in LAYOUT}
        ctx.default_map = {**(ctx.default_map or {}), **values}


def unknown(value: str, problem: str) -> UsageError:
    """The error for a name that is no recipe, with those that look like it."""
    near = near_names(value)
    meant = f"Did you mean {' or '.join(near)}?  " if near else ""
    return UsageError(
        f"{value[:300]}: {problem}.", meant + "`msconv recipes` lists recipes; owner/name is pulled."
    )


first_argument = click.argument(
    "ref", required=False, is_eager=True, expose_value=False, callback=_take_first, shell_complete=complete_models
)  # --model without its flag


def model_option(text: str, is_required: bool = False) -> Callable[[Any], Any]:
    """Option --model REF.  The command gets a directory or `owner/name[@revision]`; of a recipe, what it names."""
    return click.option(
        "--model",
        metavar="REF",
        is_eager=True,
        callback=_need_model if is_required else _resolve_model,
        shell_complete=complete_models,
        help=text,
    )


recipe_option = click.option(
    "--recipe",
    metavar="NAME",
    is_eager=True,
    expose_value=False,
    callback=_resolve_recipe,
    shell_complete=complete_recipes,
    help="A recipe's values, as defaults.",
)

harmless_option = click.option(
    "--harmless",
    metavar="KEY",
    multiple=True,
    help="A key of config.json that msconv refuses and that changes nothing (repeatable).",
)

source_option = click.option(
    "--source",
    "hub",
    type=click.Choice(HUBS),
    default=HUBS[0],
    show_default=True,
    help="The hub that owner/name of --model is on.",
)
