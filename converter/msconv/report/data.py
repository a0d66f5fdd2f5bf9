"""An artifact's facts as plain data: what `msconv report --json` prints and the page shows.  Pure: from the
manifest, the configuration and what is remembered of compiling; no disk.  Sizes are in bytes, of one rank."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from msconv_runtime.artifact import Graph, Manifest, TensorEntry, Weights
from msconv_runtime.claims import CLAIMED, is_checked_here
from msconv_runtime.dtypes import DTYPES
from msconv_runtime.roles import best_variant
from msconv_runtime.targets import TARGETS, device_of

from ..families import DecoderConfig, family_named
from ..layout.constants import RANK_CONSTANTS
from ..layout.coverage import own_names, unused_names
from ..layout.cuts import Mesh
from ..layout.kept import kept_groups
from ..layout.memory import RESERVED, DeviceMemory, kv_bytes_per_token
from ..layout.model import Table, expand, present
from ..layout.names import fold
from ..quant import PLAIN, formats_named, kept_format
from ..standing import standings
from ..workspace.names import default_name
from ..workspace.timings import Timing
from .cutting import cutting
from .groups import KV_CACHE, ORDER, folded, group_of
from .int8 import int8_proof
from .verification import verification

CONTEXT, LONG_CONTEXT = 4096, 32768
REQUESTS = (1, 8, 32)  # at a time
MAX_RANKS = 64  # rows of a table; what is beyond is folded or counted
MAX_NAMES = 400
AS_STORED = "as stored"

Data = dict[str, Any]


def describe(manifest: Manifest, config: DecoderConfig, timings: Mapping[str, Timing]) -> Data:
    """Everything that the report says.  `timings` by path of the graph."""
    mesh = Mesh(manifest.parallel.tp, manifest.parallel.ep)
    targets = list(dict.fromkeys(g.target for g in manifest.graphs))
    layout = f"tp {mesh.tp}" + (f", ep {mesh.ep}" if mesh.ep > 1 else "")
    return {
        "title": f"{manifest.model.source}, {layout}",
        "tool": manifest.tool,
        "format": manifest.format,
        "verdict": _verdict(manifest, targets),
        "model": _model(manifest, config),
        "parallel": {"tp": mesh.tp, "ep": mesh.ep},
        "weights": _weights(manifest.weights),
        "use": _use(manifest, targets),
        "commands": _commands(manifest, config, targets),
        "memory": _memory(manifest, config, mesh, targets),
        "ranks": _ranks(manifest, config, mesh),
        "cutting": _cutting(manifest, config, mesh),
        "verification": [
            verification(t, manifest.proof_for(t), config.layers, manifest.weights is not None) for t in targets
        ],
        "int8": [d for t in targets if (d := int8_proof(t, manifest.proof_for(t), config.layers))],
        "standing": {s.target: s.data for s in standings(manifest)},
        "coverage": _coverage(manifest, config, mesh, targets),
        "graphs": [_graphs(manifest, t, timings) for t in targets],
    }


def _verdict(manifest: Manifest, targets: list[str]) -> Data:
    """`state`: proven, claimed, partly proven, unproven, no graphs or no weights."""
    proofs = {t: manifest.proof_for(t) for t in targets}
    proven = [t for t, p in proofs.items() if p]
    unproven = [t for t, p in proofs.items() if not p]
    old = {v.target for v in manifest.verified}
    if manifest.weights is None:
        state, meaning = "no weights", "There are graphs only: a conversion into this directory adds the weights."
        meaning = meaning if targets else "There is a configuration only: neither weights nor graphs."
    elif not targets:
        state, meaning = (
            "no graphs",
            "There are weights only: without graphs nothing can be run or proven.",
        )
    elif not unproven and not all(is_checked_here(p) for p in proofs.values() if p):
        state = "claimed"
        meaning = (
            f"That the graphs compute on these weights what transformers computes is {CLAIMED}; "
            "`msconv verify` checks it here."
        )
    elif not unproven:
        state = "proven"
        meaning = "The graphs compute on these weights what transformers computes on the source checkpoint."
    elif proven:
        state, meaning = "partly proven", "Some targets are proven against transformers, others are not."
    else:
        state, meaning = "unproven", "These graphs were not compared with the source checkpoint on these weights."
    if stale := sorted(old.intersection(unproven)):
        meaning += f" An earlier proof for {', '.join(stale)} does not hold for these bytes."
    how_far = [{"target": s.target, "words": s.words} for s in standings(manifest)]
    return {"state": state, "meaning": meaning, "proven": proven, "unproven": unproven, "standings": how_far}


def _use(manifest: Manifest, targets: list[str]) -> list[Data]:
    """What can be done with the artifact as it is, target by target, under its default name."""
    place = _default_output(manifest)
    files = {f.name for f in manifest.files}
    ids = " -- --skip-tokenizer-init" if files and "tokenizer.json" not in files else ""
    lines: list[tuple[str, str, str]] = []
    for target in targets if manifest.weights else ():
        device = device_of(target)
        if manifest.proof_for(target) is None:
            lines.append((target, "prove it", f"msconv verify {place} --target {target}"))
        if not device.has_run and not manifest.rehearsals_for(target):
            lines.append((target, "try its server without a device", f"msconv rehearse {place} --target {target}"))
        if device.served_by:
            continue
        several = [t for t in targets if device_of(t).kind == device.kind]
        named = f" --target {target}" if len(several) > 1 else ""
        lines.append(
            (target, f"serve it on {device.words}", f"msconv serve {place} --device {device.kind}{named}{ids}")
        )
    if not targets and manifest.weights:
        lines.append(("", "compile its graphs", f"msconv compile {place}"))
    lines.append(("", "see whether a machine can serve it", f"msconv doctor {place}"))
    return [{"target": target, "what": what, "line": line} for target, what, line in lines]


def _cutting(manifest: Manifest, config: DecoderConfig, mesh: Mesh) -> list[Data]:
    family = family_named(manifest.model.family)
    stored = {t.name for t in manifest.weights.tensors} if manifest.weights else ()
    return cutting(family.table, config.sizes(), mesh, stored) if family else []


def _default_output(manifest: Manifest) -> str:
    p = manifest.parallel
    return shlex.quote(f"artifacts/{default_name(manifest.model.source.rpartition('/')[2], p.tp, p.ep)}")


def _model(manifest: Manifest, config: DecoderConfig) -> Data:
    m = manifest.model
    return {
        "source": m.source,
        "commit": m.commit or None,
        "family": m.family,
        "architecture": m.architecture,
        "parameters": m.parameters,
        "layers": config.layers,
        "moe_layers": sum(config.moe.layers) if config.moe else 0,
        "experts": config.moe.experts if config.moe else 0,
        "vocabulary": config.vocab,
        "config_digest": m.config_digest,
        "files": len(m.files),
        "source_bytes": sum(f.size for f in m.files),
    }


def _weights(w: Weights | None) -> Data | None:
    if w is None:
        return None
    return {
        "dtype": w.dtype,
        "source_dtype": w.source_dtype,
        "cast": w.source_dtype != w.dtype,
        "quant": w.quant,
        "formats": _formats(w),
        "digest": w.digest,
        "files": len(w.files),
        "bytes": sum(f.size for f in w.files),
    }


def _formats(w: Weights) -> list[Data]:
    """What is kept how, by weight format; of one rank."""
    groups = kept_groups(((t.name, t.dtype, t.nbytes) for t in w.tensors), formats_named(w.quant))
    whole = sum(g.nbytes for g in groups)
    return [
        {
            "title": g.title,
            "dtype": g.dtype,
            "groups": ", ".join(name for name in ORDER if name in {group_of(n) for n in g.names}),
            "names": list(g.names[:MAX_NAMES]),
            "tensors": g.tensors,
            "bytes": g.nbytes,
            "share": _share(g.nbytes, whole),
        }
        for g in groups
    ]


def _commands(manifest: Manifest, config: DecoderConfig, targets: list[str]) -> list[Data]:
    """How to make the same artifact again, under its default name, and how to check it."""
    m, p, w = manifest.model, manifest.parallel, manifest.weights
    output = f"artifacts/{default_name(m.source.rpartition('/')[2], p.tp, p.ep)}"
    model = f"{m.source}@{m.commit}" if m.commit else m.source
    layout = ["--tp", str(p.tp)] + (["--ep", str(p.ep)] if p.ep > 1 else [])
    layout += ["--no-drafts"] if config.mtp_layers and manifest.draft is None else []
    flags = [flag for t in targets for flag in ("--target", t)]
    lines: list[tuple[str, list[str]]] = []
    if w is not None:
        dtype = ["--dtype", w.dtype] if w.dtype != w.source_dtype else []
        quant = ["--quant", w.made] if w.made else []
        harmless = [word for key in m.harmless for word in ("--harmless", key)]
        lines.append(
            ("convert", ["convert", "--model", model, *layout, *dtype, *quant, *harmless, "--output", output])
        )
        if targets:
            lines.append(("compile", ["compile", output, *flags]))
        lines += [(f"verify {t}", ["verify", output, "--target", t]) for t in targets]
    elif targets:
        lines.append(("compile", ["compile", "--model", model, *layout, *flags, "--output", output]))
    lines.append(("check every byte", ["inspect", output, "--check"]))
    return [{"what": what, "line": shlex.join(["msconv", *line])} for what, line in lines]


def _memory(manifest: Manifest, config: DecoderConfig, mesh: Mesh, targets: list[str]) -> Data:
    context = min(CONTEXT, config.max_positions)
    entries = []
    for target in targets:
        graphs = best_variant(manifest.graphs_for(target))
        sizes = {p.name: _nbytes(p.shape, p.dtype) for g in graphs for p in g.reads}
        entries.append(_memory_of(target, graphs[0].caches[0].dtype, sizes, config, mesh, context))
    if manifest.weights and not any(TARGETS[t].devices for t in targets if t in TARGETS):
        w = manifest.weights
        entries.append(
            _memory_of(AS_STORED, w.dtype, {t.name: t.nbytes for t in w.tensors}, config, mesh, context)
        )
    return {"context": context, "sequences": 1, "reserved": RESERVED, "targets": entries}


def _memory_of(
    target: str, dtype: str, sizes: Mapping[str, int], config: DecoderConfig, mesh: Mesh, context: int
) -> Data:
    """One rank's memory for a target, by group, with a cache of `dtype`, and the devices it could be.  All ranks
    need the same."""
    per_token = kv_bytes_per_token(config.sizes(), mesh, dtype)
    need = DeviceMemory(sum(sizes.values()), per_token, context, 1)
    by_group: dict[str, int] = {KV_CACHE: need.kv_bytes}
    for name, size in sizes.items():
        by_group[group_of(name)] = by_group.get(group_of(name), 0) + size
    groups = [
        {"group": g, "bytes": by_group[g], "share": _share(by_group[g], need.total_bytes)}
        for g in ORDER
        if g in by_group
    ]
    devices = [
        {
            "name": d.name,
            "memory_bytes": d.memory_bytes,
            "share": _share(need.total_bytes, d.memory_bytes),
            "fits": need.fits(d.memory_bytes),
            "tokens": max(0, int(d.memory_bytes * (1 - RESERVED)) - need.weight_bytes) // per_token,
        }
        for t in TARGETS.values()
        for d in t.devices
        if target in (t.name, AS_STORED)
    ]
    return {
        "target": target,
        "dtype": dtype,
        "groups": groups,
        "weight_bytes": need.weight_bytes,
        "kv_bytes_per_token": per_token,
        "kv_bytes": need.kv_bytes,
        "total_bytes": need.total_bytes,
        "devices": devices,
        "loads": _loads(need.weight_bytes, per_token, context, config.max_positions, devices),
    }


def _loads(weight_bytes: int, per_token: int, context: int, max_positions: int, devices: list[Data]) -> list[Data]:
    """What so many requests of so many tokens take, and which devices they fit: a table to choose from."""
    contexts = sorted({context, min(LONG_CONTEXT, max_positions)})
    loads = [DeviceMemory(weight_bytes, per_token, c, n) for c in contexts for n in REQUESTS]
    return [
        {
            "requests": load.batch,
            "context": load.context,
            "total_bytes": load.total_bytes,
            "fits": ["fits" if load.fits(d["memory_bytes"]) else "does not fit" for d in devices],
        }
        for load in loads
        if devices
    ]


def _ranks(manifest: Manifest, config: DecoderConfig, mesh: Mesh) -> list[Data]:
    """Files and experts of each rank; of more than MAX_RANKS, neighbours that have the same are one row."""
    sizes: list[list[int]] = [[] for _ in mesh.ranks]
    for f in manifest.weights.files if manifest.weights else ():
        sizes[f.rank].append(f.size)
    per_group = config.moe.experts // mesh.ep if config.moe else 0
    found = [  # (first expert, experts, files, bytes) of each rank
        (mesh.ep_rank(r) * per_group, per_group, len(sizes[r]), sum(sizes[r])) for r in mesh.ranks
    ]
    rows: list[tuple[list[int], tuple[int, int, int, int]]] = []
    for rank, what in enumerate(found):
        if mesh.tp > MAX_RANKS and rows and rows[-1][1] == what:
            rows[-1][0].append(rank)
        else:
            rows.append(([rank], what))
    return [
        {
            "ranks": _span(ranks[0], len(ranks)),
            "experts": _span(first, count) if count else None,
            "num_experts": count,
            "shared_by": mesh.moe_tp if count else 0,
            "files": num_files,
            "bytes": size,
        }
        for ranks, (first, count, num_files, size) in rows[:MAX_RANKS]
    ]


def _coverage(manifest: Manifest, config: DecoderConfig, mesh: Mesh, targets: list[str]) -> Data:
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


def _graphs(manifest: Manifest, target: str, timings: Mapping[str, Timing]) -> Data:
    graphs = manifest.graphs_for(target)
    stored = {t.name: t.dtype for t in manifest.weights.tensors} if manifest.weights else {}
    parameters = {p.name: p.dtype for g in graphs for p in g.reads}
    casts = {f"{stored[n]} to {dtype}" for n, dtype in parameters.items() if stored.get(n, dtype) != dtype}
    kinds = Counter[str]()
    for g in graphs:
        kinds.update(g.kinds)
    return {
        "target": target,
        "casts": sorted(casts),
        "phases": [_phase(g, timings.get(g.path)) for g in graphs],
        "kinds": [
            {"kind": kind, "nodes": [g.kinds.get(kind, 0) for g in graphs]}
            for kind, _ in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def _phase(g: Graph, timing: Timing | None) -> Data:
    return {
        "phase": g.phase,
        "role": g.role,
        "variant": g.variant,
        "path": g.path,
        "bytes": g.size,
        "nodes": g.nodes,
        "inputs": len(g.inputs),
        "parameters": len(g.reads),
        "nz": len(g.nz),
        "groups": g.groups,
        "mindspore": g.mindspore,
        "onnx": g.onnx,
        "digest": g.digest,
        "compile_seconds": timing.seconds if timing and timing.digest == g.digest else None,
    }


def _nbytes(shape: list[int], dtype: str) -> int:
    size = DTYPES[dtype].nbytes
    for n in shape:
        size *= n
    return size


def _capped(names: Iterable[str]) -> list[dict[str, str | int]]:
    return folded(sorted(names))[:MAX_NAMES]


def _share(part: int, whole: int) -> float:
    return float(f"{part / whole:.6g}") if whole else 0.0


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}..{first + count - 1}"
