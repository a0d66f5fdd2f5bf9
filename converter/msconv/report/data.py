"""An artifact's facts as plain data: what `msconv report --json` prints and the page shows.  Pure: from the
manifest, the configuration and what is remembered of compiling; no disk.  Sizes are in bytes, of one rank."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from msconv_runtime.artifact import Graph, Manifest, Weights
from msconv_runtime.claims import CLAIMED, is_checked_here
from msconv_runtime.targets import device_of

from ..families import DecoderConfig, family_named
from ..layout.cuts import Mesh
from ..layout.kept import kept_groups
from ..quant import formats_named
from ..standing import standings
from ..workspace.names import default_name
from ..workspace.timings import Timing
from .coverage import MAX_NAMES, coverage
from .cutting import cutting
from .groups import ORDER, group_of
from .int8 import int8_proof
from .memory import memory, share
from .verification import verification

MAX_RANKS = 64  # rows of a table; what is beyond is folded or counted

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
        "memory": memory(manifest, config, mesh, targets),
        "ranks": _ranks(manifest, config, mesh),
        "cutting": _cutting(manifest, config, mesh),
        "verification": [verification(t, manifest, config.layers) for t in targets],
        "int8": [d for t in targets if (d := int8_proof(t, manifest.proof_for(t), config.layers))],
        "standing": {s.target: s.data for s in standings(manifest)},
        "coverage": coverage(manifest, config, mesh, targets),
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
    elif not unproven and not all(is_checked_here(manifest, p) for p in proofs.values() if p):
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
        "bytes": w.nbytes,
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
            "share": share(g.nbytes, whole),
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
    compiling = _compile_flags(manifest, targets)
    lines: list[tuple[str, list[str]]] = []
    if w is not None:
        dtype = ["--dtype", w.dtype] if w.dtype != w.source_dtype else []
        quant = ["--quant", w.made] if w.made else []
        harmless = [word for key in m.harmless for word in ("--harmless", key)]
        lines.append(
            ("convert", ["convert", "--model", model, *layout, *dtype, *quant, *harmless, "--output", output])
        )
        lines += [("compile", ["compile", output, *flags]) for flags in compiling]
        lines += [(f"verify {t}", ["verify", output, "--target", t]) for t in targets]
    else:
        lines += [
            ("compile", ["compile", "--model", model, *layout, *flags, "--output", output]) for flags in compiling
        ]
    lines.append(("check every byte", ["inspect", output, "--check"]))
    return [{"what": what, "line": shlex.join(["msconv", *line])} for what, line in lines]


def _compile_flags(manifest: Manifest, targets: list[str]) -> list[list[str]]:
    """Of each command that compiles: targets whose graphs have the same fused are one's."""
    found: dict[tuple[str, ...], list[str]] = {}
    for target in targets:
        fused = tuple(sorted({f for g in manifest.graphs_for(target) for f in g.fused}))
        found.setdefault(fused, []).extend(("--target", target))
    return [flags + [word for f in fused for word in ("--fuse", f)] for fused, flags in found.items()]


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
        "fused": g.fused,
        "inputs": len(g.inputs),
        "parameters": len(g.reads),
        "nz": len(g.nz),
        "groups": g.groups,
        "mindspore": g.mindspore,
        "onnx": g.onnx,
        "digest": g.digest,
        "compile_seconds": timing.seconds if timing and timing.digest == g.digest else None,
    }


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}..{first + count - 1}"
