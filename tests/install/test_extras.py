"""What modules import when they are imported: the standard library, the wheel's base, or what an extra brings.

`make test-install` finds the same by importing all of them in environments; this reads them.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.install.environments import NOT_IN_THE_BASE, ROOT

NAMES = {"pyyaml": "yaml"}  # a package that is imported by another name
OWN = {"msconv", "msconv_runtime"}
WITH_OTHERS = {"huggingface_hub", "markupsafe"}  # of the extra `hub`; of jinja2
APART = ("rehearsal/device", "standins")  # modules under other packages' names


def at_import(statements: list[ast.stmt]) -> Iterator[str]:
    """The packages that these statements import, without those in functions and under `if TYPE_CHECKING`."""
    for s in statements:
        if isinstance(s, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in s.names)
        elif isinstance(s, ast.ImportFrom) and not s.level and s.module:
            yield s.module.partition(".")[0]
        elif isinstance(s, ast.If | ast.ClassDef | ast.With) and "TYPE_CHECKING" not in ast.dump(s):
            yield from at_import(s.body)


def imported(root: Path) -> dict[str, str]:
    """By package: a module that imports it."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        if not any(part in str(path) for part in APART):
            for name in at_import(ast.parse(path.read_text()).body):
                found.setdefault(name, str(path.relative_to(root)))
    return {name: where for name, where in found.items() if name not in sys.stdlib_module_names | OWN}


def test_what_modules_import_is_in_the_base_or_known_to_come_with_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[<>=]", d)[0].lower() for d in project["dependencies"]}
    found = imported(ROOT / "converter") | imported(ROOT / "runtime")
    known = {NAMES.get(name, name) for name in base} | set(NOT_IN_THE_BASE) | WITH_OTHERS
    assert {name: where for name, where in found.items() if name not in known} == {}
    brought = set(NOT_IN_THE_BASE.values()) - {"installed apart"}
    assert brought <= set(project["optional-dependencies"])
