"""How each tensor of a family is divided over the ranks, as data to draw."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..layout.cuts import Mesh
from ..layout.model import Output, Sizes, Table, expand
from ..layout.names import fold
from .groups import ORDER, group_of

MAX_PIECES = 16  # that are drawn; of more the picture is the same


def cutting(table: Table, sizes: Sizes, mesh: Mesh, stored: Collection[str]) -> list[dict[str, Any]]:
    """A row a rule that made a tensor which is `stored`; without any (graphs only), one that all models have.

    A row: names folded over layers, its group, `words` that say how it is cut, `axis` (rows, columns or none) and
    `pieces`, of which each rank has one.
    """
    by_rule: dict[str, list[Output]] = {}
    for output in expand(table, sizes):
        if output.name not in stored if stored else output.rule.optional:
            continue
        by_rule.setdefault(output.rule.dst, []).append(output)
    rows = []
    for outputs in by_rule.values():
        axis, pieces, words = _cut(outputs[0], mesh)
        name, _ = next(iter(fold(o.name for o in outputs)))
        drawn = list(range(min(pieces, MAX_PIECES)))
        group = group_of(outputs[0].name)
        rows.append({"name": name, "group": group, "axis": axis, "pieces": pieces, "drawn": drawn, "words": words})
    return sorted(rows, key=lambda row: ORDER.index(row["group"]))


def _cut(output: Output, mesh: Mesh) -> tuple[str, int, str]:
    """Axis, pieces and words of an output's first part that is cut."""
    if output.rule.stacked:
        shared = "each whole" if mesh.moe_tp == 1 else "each over the ranks that share it"
        return "rows", mesh.ep, f"experts divided over groups of ranks, {shared}"
    cuts = [part.cut for part, _ in output.sources if part.cut.axis is not None]
    pieces = max((mesh.moe_tp if cut.over == "moe_tp" else mesh.tp for cut in cuts), default=1)
    if pieces == 1:
        return "none", 1, "the same on every rank" if not cuts else "whole: there is one rank"
    if any(cut.unit for cut in cuts):
        return ("rows" if cuts[0].axis == 0 else "columns"), pieces, "by whole heads"
    return ("rows", pieces, "by rows") if cuts[0].axis == 0 else ("columns", pieces, "by columns")
