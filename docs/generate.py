"""docs/commands.md from the command line itself: help, options, variables, fields of --json, exit codes.

python -m docs.generate > docs/commands.md
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from msconv.checkpoint.hub_errors import HubError
from msconv.checkpoint.store_errors import StoreError
from msconv.cli import COMMANDS, cli
from msconv.cli.result import INTERRUPTED
from msconv.recipes import RecipeError
from msconv_runtime import errors

FIELDS = Path(__file__).parents[1] / "tests" / "cli" / "fields.txt"
ELSEWHERE = (HubError, StoreError, RecipeError)  # errors with codes of their own beside those of `errors`
DEFAULT = re.compile(r"\s*\[default: (.*)\]\.?$")
EVERYWHERE = ("--json", "--quiet", "--verbose")
INTRODUCTION = """\
# Commands

For people and scripts that need every option, variable, field and exit code.

Written by `python -m docs.generate`; a test compares it with the program.

Data goes to stdout, everything else to stderr. An option is taken from the command line, else from its variable,
else from the recipe, else from its default. A flag's variable is set by `1`. Sizes are bytes or `512M`, `2GiB`.

Every command has `--json` ([what it prints](#json)), `--quiet` and `--verbose`; the latter two may also stand
before the command, or be set as `MSCONV_QUIET` and `MSCONV_VERBOSE`. `NO_COLOR` is respected. Where ARTIFACT is in
brackets and left out, the newest one in `artifacts/` is taken; `doctor` then looks at the machine alone.
"""
FIELDS_INTRODUCTION = """\
One object on stdout. `[]` is a list of such values, a name without further ones may hold an object whose keys are
data. A number that is not finite, such as the error of a logit that is NaN, is `null`: JSON has none for it.
After an error it is `{"error": {"code", "message", "hint"}}` with the codes below.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_commands(), *_exit_codes()])


def _commands() -> Iterator[str]:
    fields = _fields()
    for name, short in COMMANDS.items():
        yield f"- [`msconv {name}`](#msconv-{name}): {short}"
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield f"\n## msconv {name}\n"
        yield f"    {_usage(command)}\n"
        yield from _help(command.help or "")
        yield from _options(command)
        yield from _json_fields({k: v for k, v in fields.items() if k.split()[1:2] == [name]})


def _usage(command: click.Command) -> str:
    context = click.Context(command, info_name=f"msconv {command.name}")
    return f"{context.command_path} {' '.join(command.collect_usage_pieces(context))}"


def _help(text: str) -> Iterator[str]:
    r"""Paragraphs; those behind a \b are examples."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            yield textwrap.indent(paragraph.removeprefix("\b\n"), "    ") + "\n"
        else:
            yield paragraph + "\n"


def _options(command: click.Command) -> Iterator[str]:
    rows: list[tuple[str, ...]] = []
    for param in command.params:
        if not isinstance(param, click.Option) or param.opts[0] in EVERYWHERE:
            continue
        names = "`" + " ".join(param.opts) + "`"
        if param.secondary_opts:
            names += ", `" + " ".join(param.secondary_opts) + "`"
        help_text = param.help or ""
        said = DEFAULT.search(help_text)
        default = said[1].replace("<", "\\<") if said else _default(param)
        variable = f"`{param.envvar}`" if param.envvar else ""
        rows.append((names, _kind(param), default, variable, DEFAULT.sub("", help_text)))
    if rows:
        yield from _table(("option", "value", "default", "variable", "what"), rows)
        yield ""


def _kind(param: click.Option) -> str:
    if param.is_flag:
        return "flag"
    if isinstance(param.type, click.Choice):
        kind = ", ".join(f"`{c}`" for c in param.type.choices)
    elif isinstance(param.type, click.IntRange):
        kind = (
            f"{param.type.min} to {param.type.max}" if param.type.max is not None else f"{param.type.min} or more"
        )
    else:
        kind = param.metavar or param.type.name
    return kind + ", repeatable" * param.multiple


def _default(param: click.Option) -> str:
    if param.required:
        return "needed"
    if param.is_flag and param.secondary_opts:
        return f"`{(param.opts if param.default else param.secondary_opts)[0]}`"
    if isinstance(param.default, str | int) and not isinstance(param.default, bool):
        return f"`{param.default}`"
    return ""


def _fields() -> dict[str, list[str]]:
    """By command line, as the tests hold them."""
    sections = (section.splitlines() for section in FIELDS.read_text().strip().split("\n\n"))
    return {first: [line.strip() for line in rest] for first, *rest in sections}


def _json_fields(forms: dict[str, list[str]]) -> Iterator[str]:
    """The fields of each form of a command; of a further form only those that the first has not."""
    first: list[str] = []
    for form, names in forms.items():
        more = [n for n in names if n not in first]
        line = ", ".join(f"`{n}`" for n in more)
        yield (
            textwrap.fill(f"`{form} --json`: {'the same and ' * bool(set(first) & set(names))}{line}", 115) + "\n"
        )
        first = first or names


def _exit_codes() -> Iterator[str]:
    yield "## JSON\n"
    yield FIELDS_INTRODUCTION
    yield "## Exit codes\n"
    rows = [("0", "", "Done.")]
    for kind in (*vars(errors).values(), *ELSEWHERE):
        if inspect.isclass(kind) and issubclass(kind, errors.MsconvError) and kind is not errors.MsconvError:
            rows.append((str(kind.exit_code), f"`{kind.code}`", " ".join((kind.__doc__ or "").split())))
    rows.append(("1", "`internal`", "A fault in msconv itself."))
    rows.append((str(INTERRUPTED), "`interrupted`", "Ended by a signal; a conversion, a push or a pull resumes."))
    yield from _table(("exit", "code in `--json`", "meaning"), sorted(rows, key=lambda r: int(r[0])))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


if __name__ == "__main__":
    print(page())
