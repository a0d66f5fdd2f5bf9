"""What people and scripts rely on, as text: commands, arguments, flags, their types and variables; JSON fields.

`python -m tests.cli.interface > tests/cli/interface.txt` after a change that is meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from msconv.cli import COMMANDS, cli

KEYS_ARE_DATA = {
    "environment",
    "by_phase",
    "norms",
    "proven",
    "standing",
    "can",
    "artifact.proven",
    "serve",
    "recipes[].serve",
}


def flags() -> str:
    """Every command with its parameters, one a line."""
    lines = [*_command("msconv", cli)]
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command
        lines += ["", *_command(f"msconv {name}", command)]
    return "\n".join(lines) + "\n"


def fields(value: Any, place: str = "") -> set[str]:
    """The places in a JSON value: `ranks[].weight_bytes`.  Keys that are data are not looked at."""
    if isinstance(value, dict) and value and place not in KEYS_ARE_DATA:
        return {f for k, v in value.items() for f in fields(v, f"{place}.{k}".lstrip("."))}
    if isinstance(value, list) and value:
        return {f for v in value for f in fields(v, f"{place}[]")}
    return {place}


def _command(title: str, command: click.Command) -> Iterator[str]:
    yield title
    for param in command.params:
        if isinstance(param, click.Option):
            names = " ".join([*param.opts, *param.secondary_opts])
            yield "  ".join(["", names, *_kind(param), str(param.envvar or "")]).rstrip()
        else:
            yield "  ".join(["", param.human_readable_name, *_kind(param)])


def _kind(param: click.Parameter) -> Iterator[str]:
    if isinstance(param.type, click.Choice):
        yield "|".join(map(str, param.type.choices))
    elif isinstance(param.type, click.IntRange):
        yield f"{param.type.min}..{'' if param.type.max is None else param.type.max}"
    elif not getattr(param, "is_flag", False):
        yield param.type.name
    if param.required:
        yield "required"
    if getattr(param, "multiple", False) or param.nargs == -1:
        yield "repeatable"
    if isinstance(param, click.Option) and (isinstance(param.default, str | int) and param.default is not False):
        yield f"[{param.default}]"


if __name__ == "__main__":
    print(flags(), end="")
