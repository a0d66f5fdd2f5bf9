"""`msconv recipes`: all there are, and one with the commands it stands for."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from ..recipes import Recipe, all_recipes, find_recipe, read_recipe
from .command import Command
from .references import complete_recipes, reference, unknown
from .result import Result, json_option, show

MEETING_PORT = 5000


@click.command("recipes", cls=Command)
@click.argument("name", required=False, shell_complete=complete_recipes)
@json_option
def command(name: str | None) -> None:
    """List recipes, or show one and its commands.

    NAME may also be a .yaml file, and the directory in MSCONV_RECIPES is looked at first.  A recipe is a layout
    and a size that `msconv plan` has worked out; what of it has really run is in its verified_on.

    \b
    msconv recipes
    msconv recipes Qwen3-8B
    msconv recipes ./my-deployment.yaml --json
    """
    if name is None:
        found = [read_recipe(path) for path in all_recipes().values()]
        data = {"recipes": [details(r) for r in found]}
        show(Result(data, table(found), next="msconv recipes Qwen3-8B  # shows one and its commands"))
        return
    recipe = find_recipe(name)
    if recipe is None:
        raise unknown(name, "no recipe has this name")
    show(Result(details(recipe), describe(recipe), next=f"msconv plan --model {reference(recipe)}"))


def details(recipe: Recipe) -> dict[str, Any]:
    """Every value of the recipe, and its commands."""
    return {**msgspec.to_builtins(recipe), "commands": commands(recipe)}


def commands(recipe: Recipe) -> list[str]:
    """Commands to type, from the checkpoint to the server."""
    from ..workspace.names import default_name

    named = reference(recipe)
    artifact = f"artifacts/{default_name(recipe.model.partition('/')[2], recipe.tp, recipe.ep)}"
    return [
        f"msconv convert --model {named}",
        f"msconv compile {artifact} --recipe {named}",
        *(f"msconv verify {artifact} --target {target}" for target in recipe.targets),
        *serve_commands(recipe, artifact, named),
    ]


def serve_commands(recipe: Recipe, artifact: str, named: str) -> list[str]:
    """One a machine, in the order of the machines; they meet at a port of the first one, whose address is in
    the variable FIRST."""
    serve = f"msconv serve {artifact} --recipe {named}"
    if recipe.devices.nodes == 1:
        return [serve]
    meeting = f"--dist-init-addr ${{FIRST:?}}:{MEETING_PORT}"
    return [f"{serve} --node-rank {rank} {meeting}" for rank in range(recipe.devices.nodes)]


def verified(recipe: Recipe) -> str:
    """Kinds of device on which something of it has run."""
    return ", ".join(sorted({run.device for run in recipe.verified_on})) or "not run yet"


def table(recipes: list[Recipe]) -> str:
    """Table with a line a recipe."""
    head = ("RECIPE", "MODEL", "TP", "EP", "DEVICES", "MEMORY EACH", "SIZED FOR", "VERIFIED ON")
    rows = [
        (
            r.name,
            r.model,
            str(r.tp),
            str(r.ep),
            f"{r.devices.count} {r.devices.kind}",
            f"{r.devices.memory_gib} GiB",
            f"{r.requests} x {r.context} tokens",
            verified(r),
        )
        for r in recipes
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )


def describe(recipe: Recipe) -> str:
    """Text about one recipe."""
    devices = recipe.devices
    nodes = f" on {devices.nodes} machines" if devices.nodes > 1 else ""
    flags = " ".join(f"{flag} {value}".strip() for flag, value in recipe.serve_flags().items())
    lines = [
        f"{recipe.name} ({recipe.path})",
        f"model       {recipe.model}, revision {recipe.revision}",
        f"layout      tp {recipe.tp}, ep {recipe.ep}, {recipe.dtype}",
        f"targets     {', '.join(recipe.targets)}",
        f"devices     {devices.count} {devices.kind} of {devices.memory_gib} GiB{nodes}",
        f"sized for   {recipe.requests} requests of {recipe.context} tokens at a time",
        f"serve       {flags}",
        *(
            f"verified    {r.what}: {r.device}, {r.when}, {', '.join(f'{k} {v}' for k, v in r.versions.items())}"
            for r in recipe.verified_on
        ),
    ]
    if not recipe.verified_on:
        lines.append("verified    not run yet: the sizes are worked out, not measured")
    typed = commands(recipe)
    if (machines := devices.nodes) > 1:
        first = "FIRST=10.0.0.1  # the first machine's address: on each machine, and then one of these lines"
        typed[-machines:-machines] = [first]
    return "\n".join([*lines, "", *(f"  {line}" for line in typed)])
