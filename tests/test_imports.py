"""What imports what in both packages: no circles, also where an import stands inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"msconv": ROOT / "converter/msconv", "msconv_runtime": ROOT / "runtime/msconv_runtime"}
ELSEWHERE = ("rehearsal/device/", "sglang/standins/")  # modules under other packages' names, for a server's path

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Files by module name; a package is its `__init__`."""
    found = {}
    for package, directory in PACKAGES.items():
        for path in directory.rglob("*.py"):
            relative = path.relative_to(directory)
            if not relative.as_posix().startswith(ELSEWHERE):
                parts = relative.with_suffix("").parts
                found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


def imports_of(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield from imports_of(other)
        else:
            yield from imports_of(node)


def named_by(statement: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> Iterator[tuple[str, str]]:
    """(module, name in it) of each thing that a statement imports; no name for `import a.b`."""
    if isinstance(statement, ast.Import):
        yield from ((alias.name, "") for alias in statement.names)
        return
    parts = module.split(".") if is_package else module.split(".")[:-1]
    base = parts[: len(parts) - statement.level + 1] if statement.level else []
    source = ".".join([*base, *filter(None, [statement.module])])
    yield from ((source, alias.name) for alias in statement.names)


def graph_of(files: dict[str, Path]) -> Graph:
    """By module: those that it imports.  `from package import module` is an import of the module alone."""
    graph: Graph = {}
    for module, path in files.items():
        graph[module] = set()
        for statement in imports_of(ast.parse(path.read_text())):
            for source, name in named_by(statement, module, path.name == "__init__.py"):
                submodule = f"{source}.{name}"
                target = submodule if submodule in files else source
                if target in files and target != module:
                    graph[module].add(target)
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], index[other])
        if lowest[module] == index[module]:
            begin = stack.index(module)
            component = stack[begin:]
            del stack[begin:]
            if len(component) > 1:
                found.append(sorted(component))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def test_no_modules_import_each_other() -> None:
    graph = graph_of(modules())
    assert len(graph) > 100
    assert circles(graph) == []


def test_a_circle_is_found_though_an_import_is_lazy(tmp_path: Path) -> None:
    texts = {
        "a": "from . import b\n",
        "b": "def f():\n    from .c.d import g\n",
        "c": "",
        "c.d": "from .. import a\nfrom ..e import h\n",
        "e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import b\n",
    }
    files = {}
    for name, text in texts.items():
        path = tmp_path / ("c/__init__" if name == "c" else name.replace(".", "/"))
        path = path.with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        files[f"p.{name}"] = path
    graph = graph_of(files)
    assert graph["p.c.d"] == {"p.a", "p.e"}
    assert circles(graph) == [["p.a", "p.b", "p.c.d"]]


def test_serving_doctor_and_command_line_know_no_engine() -> None:
    graph = graph_of(modules())
    free = ("msconv_runtime.doctor", "msconv_runtime.serving", "msconv.cli", "msconv.recipes")
    for module, imported in graph.items():
        if module.startswith(free):
            assert not [name for name in imported if name.startswith("msconv_runtime.sglang")], module


def test_programs_of_before_find_use_cpu_where_it_was() -> None:
    from msconv_runtime.sglang import environment, launch

    assert launch.use_cpu is environment.use_cpu
