"""The shape of the code: functions fit on a screen, and one place decides how a command's answer is printed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLI = ROOT / "converter/msconv/cli"
LONGEST_FUNCTION, LONGEST_FILE, MOST_ARGUMENTS = 60, 300, 9
SHOWS = CLI / "result.py"  # where --json is asked for
DOES_LESS = CLI / "report.py"  # with --json it writes no page of its own accord

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def num_lines(function: Function) -> int:
    """Lines from `def` to its end, without decorators."""
    return (function.end_lineno or 0) - function.lineno + 1


def long_functions(source: str, limit: int = LONGEST_FUNCTION) -> list[str]:
    """Functions of more lines than that."""
    return [f"{f.name}: {num_lines(f)} lines" for f in functions(ast.parse(source)) if num_lines(f) > limit]


def modes(source: str) -> set[str]:
    """What in a source decides by --json, or prints JSON itself: names, and text such as "--json"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        name = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.alias: "name", ast.keyword: "arg"}.get(
            type(node)
        )
        text = getattr(node, name) if name else node.value if isinstance(node, ast.Constant) else None
        if text in ("as_json", "--json", "is_json_asked", "json"):
            found.add(text)
    return found


def arguments(function: Function) -> int:
    return len(function.args.posonlyargs) + len(function.args.args) + len(function.args.kwonlyargs)


def commands() -> list[Path]:
    return [p for p in sorted(CLI.glob("*.py")) if p != SHOWS]


@pytest.mark.parametrize("package", ["converter", "runtime"])
def test_functions_fit_on_a_screen(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 20
    long = {str(p.relative_to(ROOT)): found for p in files if (found := long_functions(p.read_text()))}
    assert long == {}


def test_files_of_the_command_line_fit_in_a_head() -> None:
    assert {p.name: n for p in CLI.glob("*.py") if (n := len(p.read_text().splitlines())) > LONGEST_FILE} == {}


def test_a_command_takes_few_arguments() -> None:
    found = {p.stem: f for p in commands() for f in functions(ast.parse(p.read_text())) if f.name == "command"}
    assert {"convert", "plan", "serve", "rehearse", "reshard"} <= set(found)
    assert {name: n for name, f in found.items() if (n := arguments(f)) > MOST_ARGUMENTS} == {}


def test_only_the_place_that_shows_results_asks_for_json() -> None:
    assert modes(SHOWS.read_text()) >= {"as_json", "--json"}
    found = {p.name: used for p in commands() if (used := modes(p.read_text()))}
    assert found == {DOES_LESS.name: {"is_json_asked"}}


def test_the_scan_sees_what_it_looks_for() -> None:
    assert long_functions("def f():\n" + "    1\n" * 60) == ["f: 61 lines"]
    assert long_functions("class C:\n    async def f(self):\n" + "        1\n" * 59) == []
    asking = "def f(as_json: bool) -> None:\n    if as_json:\n        print(json.dumps({}))"
    assert modes(asking) == {"as_json", "json"}
    assert modes("show(f(is_json=True))\nif '--json' in sys.argv: pass") == {"--json"}
