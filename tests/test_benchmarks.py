"""What benchmarks take from the product is still there."""

from __future__ import annotations

import ast
from pathlib import Path

from msconv_runtime import graphs

TRACED = Path(__file__).parent.parent / "benchmarks" / "traced" / "slot.py"


def attributes(path: Path, name: str) -> set[str]:
    """What the __init__ of a class sets.  Files are read: SGLang's slot is imported in a server only."""
    (found,) = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name)
    (init,) = (n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    return {n.attr for n in ast.walk(init) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


def test_traced_graphs_have_all_that_graphs_have() -> None:
    theirs = attributes(Path(graphs.__file__), "Graphs")
    assert "entries" in theirs
    assert theirs <= attributes(TRACED, "TracedGraphs")
