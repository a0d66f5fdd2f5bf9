"""An artifact's tensors against its family's table, and each target's graphs against the tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msconv_runtime.artifact import Manifest, TensorEntry, Weights

from ..families import DecoderConfig, family_named
from ..layout.constants import RANK_CONSTANTS
from ..layout.coverage import own_names, unused_names
from ..layout.cuts import Mesh
from ..layout.model import Table, expand, present
from ..layout.names import fold
from ..quant import PLAIN, formats_named, kept_format
from .groups import folded, group_of

MAX_NAMES = 400

Data = dict[str, Any]


def coverage(manifest: Manifest, config: DecoderConfig, mesh: Mesh, targets: list[str]) -> Data:
    """The artifact's tensors against the family's table, and each target's graphs against the tensors."""
    family = family_named(manifest.model.family)
    table = family.table if family else None
    w = manifest.weights
    expected = _expected(table, config, w) if table else set[str]()
    expected |= {n for n in RANK_CONSTANTS if mesh.ep > 1 or (mesh.tp > 1 and n != "expert_start")}
    tensors = w.tensors if w else []
    stored = {t.name for t in tensors}
    dropped = [{"name": d.name, "tensors": d.count, "reason": d.reason} for d in w.dropped] if w else []
    return {
        "expected": len(expected),
        "stored": len(stored),
        "missing": _capped(expected - stored if w else ()),
        "unused": _capped(stored - expected),
        "kept": _kept(tensors)[:MAX_NAMES],
        "dropped": dropped[:MAX_NAMES],
        "padded": [{"name": p.name, "size": p.size, "padded": p.padded} for p in w.padded] if w else [],
        "targets": [_coverage_of(manifest, t, stored) for t in targets] if w else [],
    }


def _expected(table: Table, config: DecoderConfig, w: Weights | None) -> set[str]:
    """Names that the table asks for: those that matrices are stored as, in the formats that they are kept in."""
    types = {t.name: t.dtype for t in w.tensors} if w else {}
    formats = formats_named(w.quant) if w else ()
    names = set[str]()
    for output in present(expand(table, config.sizes()), types):
        kept = kept_format(output.name, types, formats)
        is_kept = kept is not PLAIN and types.get(output.name) == kept.stored[0].dtype
        names |= {stored.of(output.name) for stored in kept.stored} if is_kept else {output.name}
    return names


def _coverage_of(manifest: Manifest, target: str, stored: set[str]) -> Data:
    read = own_names(p.name for g in manifest.graphs_for(target) for p in g.reads)
    return {
        "target": target,
        "read": len(read),
        "missing": _capped(read - stored),
        "unused": _capped(unused_names(stored, read)),
        "not_needed": sorted(stored.intersection(RANK_CONSTANTS) - read),
    }


def _kept(tensors: Iterable[TensorEntry]) -> list[Data]:
    """Tensors folded over layers, those of one shape and type together, in the order of the files."""
    alike: dict[tuple[str, tuple[int, ...], str], list[TensorEntry]] = {}
    for t in tensors:
        alike.setdefault((group_of(t.name), tuple(t.shape), t.dtype), []).append(t)
    rows = []
    for (group, shape, dtype), members in alike.items():
        for name, count in fold(t.name for t in members):
            size = members[0].nbytes * count
            shown = " × ".join(map(str, shape)) or "scalar"
            rows.append(
                {"name": name, "tensors": count, "group": group, "shape": shown, "dtype": dtype, "bytes": size}
            )
    return rows


def _capped(names: Iterable[str]) -> list[dict[str, str | int]]:
    return folded(sorted(names))[:MAX_NAMES]
