"""`msconv inspect`: what an artifact holds, and whether its bytes are intact."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from msconv_runtime.artifact import Artifact, Manifest, Weights
from msconv_runtime.artifact.integrity import Damage, check_artifact, check_graphs
from msconv_runtime.artifact.served import other_files
from msconv_runtime.claims import CLAIMED, is_checked_here
from msconv_runtime.errors import ArtifactError
from msconv_runtime.signatures import described, refuse_unsigned
from msconv_runtime.targets import device_of
from msconv_runtime.units import human_bytes

from ..checkpoint.hubs import REPOSITORY
from ..layout.kept import KeptGroup, kept_groups
from ..layout.names import fold
from ..quant import formats_named
from ..standing import standings
from .command import Command
from .console import byte_progress, find_artifact, visible
from .conversion import MOST_NAMES
from .here import quoted, serve_command
from .options import artifact_argument, signature_option
from .result import Result, json_option, show
from .sign import signed_line


@click.command("inspect", cls=Command)
@artifact_argument
@click.option("--check", is_flag=True, help="Read every byte and compare digests.")
@signature_option
@json_option
def command(artifact: Path | None, check: bool, require_signature: Path | None) -> None:
    """Show what an artifact holds; --check reads every byte.

    \b
    msconv inspect artifacts/Qwen3-8B-tp4
    msconv inspect artifacts/Qwen3-8B-tp4 --check
    msconv inspect artifacts/Qwen3-8B-tp4 --require-signature me.pub
    """
    root = find_artifact(artifact)
    if require_signature is not None:
        refuse_unsigned(root, require_signature)
    opened = Artifact(root)
    manifest = opened.manifest
    data = summary(root, manifest)
    damage = check_graphs(opened)
    if check:
        total = manifest.weights.nbytes if manifest.weights else 0
        with byte_progress("checking", total) as advance:
            damage = check_artifact(opened, advance)
        data["check"] = {
            "ok": not damage,
            "damage": [{"path": d.path, "tensor": d.tensor, "problem": d.problem} for d in damage],
        }
    if damage:  # a proof holds for the bytes it was made on
        data["proven"] = dict.fromkeys(data["proven"])
        data["standing"] = {}
    show(
        Result(
            data,
            describe(_single_lines(data)),
            lines=[
                *["Every byte is as the manifest says."] * (check and not damage),
                *signed_line(require_signature),
            ],
            failure=_failure(root, damage),
            next="" if damage else next_command(root, manifest),
        )
    )


def _failure(root: Path, damage: list[Damage]) -> ArtifactError | None:
    if not damage:
        return None
    places = (f"{d.path}: {d.tensor or 'file'}: {d.problem}" for d in damage[:50])
    lines = "\n".join(f"  {visible(place, keep='')}" for place in places)
    return ArtifactError(
        f"{root}: {len(damage)} places differ from the manifest:\n{lines}",
        "Copy the artifact again, or convert again with --force.",
    )


def next_command(root: Path, manifest: Manifest) -> str:
    """Command for what an artifact lacks most: weights, graphs, a proof, or only a server."""
    targets, named = list(dict.fromkeys(g.target for g in manifest.graphs)), quoted(root)
    if manifest.weights is None:
        parallel, source = manifest.parallel, manifest.model.source
        known = REPOSITORY.fullmatch(source) or Path(source).is_dir()
        layout = f"--tp {parallel.tp} --ep {parallel.ep} --output {named}"
        return f"msconv convert {shlex.quote(source) if known else 'DIR'} {layout}  # adds the weights"
    if not targets:
        return f"msconv compile {named}"
    unproven = [t for t in targets if manifest.proof_for(t) is None]
    if unproven:
        return f"msconv verify {named} --target {visible(unproven[0], keep='')}"
    if Artifact(root, manifest).is_draft:
        return f"msconv compile TARGET --draft {named}  # TARGET: the model it drafts for"
    if all(device_of(target).served_by for target in targets):
        return ""
    return serve_command(root)


def summary(root: Path, manifest: Manifest) -> dict[str, Any]:
    """Facts of the manifest as people ask for them.  `proven` per target holds only for these very bytes."""
    w = manifest.weights
    targets = list(dict.fromkeys(g.target for g in manifest.graphs))
    proofs = {t: manifest.proof_for(t) for t in targets}
    return {
        "artifact": str(root),
        "format": manifest.format,
        "tool": manifest.tool,
        "model": {
            "source": manifest.model.source,
            "family": manifest.model.family,
            "parameters": manifest.model.parameters,
        },
        "parallel": {"tp": manifest.parallel.tp, "ep": manifest.parallel.ep},
        "weights": None
        if w is None
        else {
            "dtype": w.dtype,
            "source_dtype": w.source_dtype,
            "quant": w.quant,
            "formats": [asdict(group) for group in _kept(manifest)],
            "bytes": w.nbytes,
            "rank_bytes": w.rank_bytes,
            "files": len(w.files),
            "digest": w.digest,
            "padded": [{"name": p.name, "size": p.size, "padded": p.padded} for p in w.padded],
        },
        "coverage": _coverage(w),
        "graphs": [
            {
                "target": g.target,
                "phase": g.phase,
                "role": g.role,
                "variant": g.variant,
                "nodes": g.nodes,
                "fused": g.fused,
                "bytes": g.size,
                "mindspore": g.mindspore,
                "onnx": g.onnx,
                "casts": _casts(manifest, g.target),
            }
            for g in manifest.graphs
        ],
        "proven": {
            t: None
            if p is None
            else {
                "max_abs_logit_error": p.max_abs_logit_error,
                "bound": p.bound,
                "reference": p.reference,
                "checked_here": is_checked_here(manifest, p),
            }
            for t, p in proofs.items()
        },
        "standing": {s.target: s.data for s in standings(manifest)},
        "files": [{"name": f.name, "bytes": f.size, "digest": f.digest} for f in manifest.files],
        "other_files": other_files(Artifact(root, manifest)),
        "signature": described(root),
    }


def _coverage(w: Weights | None) -> dict[str, Any]:
    kept = fold(t.name for t in w.tensors) if w else []
    dropped = w.dropped if w else []
    return {
        "kept": [{"name": n, "count": c} for n, c in kept],
        "dropped": [{"name": d.name, "count": d.count, "reason": d.reason} for d in dropped],
    }


def _kept(manifest: Manifest) -> list[KeptGroup]:
    """What the weights are kept as, by format."""
    w = manifest.weights
    if w is None:
        return []
    return kept_groups(((t.name, t.dtype, t.nbytes) for t in w.tensors), formats_named(w.quant))


def _named(graph: dict[str, Any]) -> str:
    return " ".join(filter(None, (graph["role"], graph["variant"] and f"({graph['variant']})")))


def _casts(manifest: Manifest, target: str) -> str:
    """Casts of the stored type that binding this target's graphs makes: "" if it copies nothing."""
    if manifest.weights is None:
        return ""
    stored = {t.name: t.dtype for t in manifest.weights.tensors}
    pairs = {
        f"{stored[p.name]} -> {p.dtype}"
        for g in manifest.graphs_for(target)
        for p in g.reads
        if stored.get(p.name, p.dtype) != p.dtype
    }
    return ", ".join(sorted(pairs))


def _single_lines(value: Any) -> Any:
    """Copy of data in which no string could pass for a line of ours."""
    if isinstance(value, dict):
        return {_single_lines(k): _single_lines(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_single_lines(v) for v in value]
    return visible(value, keep="") if isinstance(value, str) else value


def _format_lines(formats: list[dict[str, Any]]) -> list[str]:
    """How much is kept in which format."""
    return [
        f"{f['title']}{'' if f['format'] else ', ' + f['dtype']}: {f['tensors']} tensors, "
        f"{human_bytes(f['nbytes'])} per rank: {', '.join(f['names'][:MOST_NAMES])}"
        + (f" and {len(f['names']) - MOST_NAMES} more" if len(f["names"]) > MOST_NAMES else "")
        for f in formats
    ]


def _beside(data: dict[str, Any]) -> str:
    """Line about what is vouched for besides weights and graphs."""
    if not data["files"]:
        return "files: made before files had digests; of those beside, only config.json is vouched for"
    return f"files: {', '.join(f['name'] for f in data['files'])}"


def describe(data: dict[str, Any]) -> str:
    """Text of the summary."""
    m, w = data["model"], data["weights"]
    lines = [
        f"{data['artifact']}: {m['source']} ({m['family']}, {m['parameters'] / 1e9:.3f} billion parameters), "
        f"tp {data['parallel']['tp']}, ep {data['parallel']['ep']}, format {data['format']}, {data['tool']}"
    ]
    if w is None:
        lines.append("weights: none")
    else:
        kinds = f"{w['quant']} and {w['dtype']}" if w["quant"] else w["dtype"]
        cast = f" (cast from {w['source_dtype']})" if w["source_dtype"] != w["dtype"] else ""
        lines.append(
            f"weights: {kinds}{cast}, {human_bytes(w['rank_bytes'])} per rank, {w['files']} files, {w['digest']}"
        )
        lines += [f"  as {line}" for line in _format_lines(w["formats"])] if w["quant"] else []
        lines += [f"  padded: {p['name']} {p['size']} -> {p['padded']}" for p in w["padded"]]
        lines += [f"  kept: {k['name']}" + f"  x{k['count']}" * (k["count"] > 1) for k in data["coverage"]["kept"]]
        lines += [
            f"  dropped: {d['name']}" + f"  x{d['count']}" * (d["count"] > 1) + f": {d['reason']}"
            for d in data["coverage"]["dropped"]
        ]
    lines.append(_beside(data))
    if data["files"] and data["other_files"]:
        lines.append(f"not of the artifact: {', '.join(data['other_files'])}")
    if signature := data["signature"]:
        words = "of before the artifact was changed" if signature["stale"] else "not checked here"
        lines.append(f"signature: by the key {signature['key'][:16]}, {words}")
    for g in data["graphs"]:
        casts = f", binding casts {g['casts']}" if g["casts"] else ""
        lines.append(
            f"graph: {g['target']} {_named(g)}: {g['nodes']} nodes, {human_bytes(g['bytes'])}, "
            + (f"{', '.join(g['fused'])} fused, " if g["fused"] else "")
            + (f"onnx {g['onnx']}" if g["onnx"] else f"mindspore {g['mindspore']}")
            + casts
        )
    for target, p in data["proven"].items():
        if p is None:
            lines.append(f"{target}: UNPROVEN.  Run `msconv verify {data['artifact']} --target {target}`.")
        else:
            claim = "" if p["checked_here"] else f"{CLAIMED}, not checked here: "
            lines.append(
                f"{target}: {claim}proven against {p['reference']}, largest logit error "
                f"{p['max_abs_logit_error']:.2e} (bound {p['bound']:.0e})"
            )
        if target in data["standing"]:
            lines.append(f"{target}: {data['standing'][target]['words']}")
    return "\n".join(lines)
