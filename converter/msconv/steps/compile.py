"""Artifact in, the same artifact with graphs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from msconv_runtime.artifact import (
    FORMAT,
    STATE_DIR,
    Artifact,
    File,
    Graph,
    Manifest,
    Parallel,
    is_artifact,
    replace_file,
    write_manifest,
)
from msconv_runtime.artifact.served import describe_file
from msconv_runtime.artifact.weights import RankWeights
from msconv_runtime.errors import ArtifactError, UsageError
from msconv_runtime.roles import ROLES
from msconv_runtime.targets import TARGETS, Target, target_named

from ..checkpoint.drafts import draft_of, with_draft
from ..checkpoint.reference import configuration
from ..families import DecoderConfig, family_named
from ..graph.spec import CannotCompute, Fixed, Local
from ..graph.store import GraphStore
from ..graph.toolchain import DUMPS, dumps_in
from ..layout.coverage import misfits, without_draft
from ..layout.cuts import Mesh, make_mesh
from ..layout.model import expected_sources
from ..layout.planning import make_plan
from ..location import Location
from ..process import peak_rss_bytes
from ..quant import format_asked
from ..workspace.clearing import refuse_foreign
from ..workspace.lock import exclusive
from ..workspace.names import TOOL
from ..workspace.recording import copy_files, model_of
from ..workspace.state import refuse_another_model
from ..workspace.timings import add_timings
from .exporting import entry, exporter, made

SOME = 20  # weights that do not fit, named in a message


@dataclass(frozen=True)
class Compiled:
    """One graph that was made, or `taken` from where graphs are kept: then nothing was compiled."""

    graph: Graph
    seconds: float
    peak_rss_bytes: int
    taken: bool = False


def begin_without_weights(
    model: Location, tp: int, ep: int, root: Path, quant: str | None = None, drafts: bool = True
) -> None:
    """Make `root` an artifact with a configuration and no weights: enough to compile for.  A later conversion
    into the same directory completes it; `quant`: what that will quantise weights to; `drafts`: whether it will
    take the layer of multi-token prediction.  Raises UsageError or ArtifactError if the directory holds something
    else."""
    mesh = make_mesh(tp, ep)
    source = model.open_configuration()
    source = with_draft(source.bare() if quant else source, drafts)
    model.origin()  # raises, if a later conversion could not record it
    model.bring_small()
    table, sizes = source.family.table, source.config.sizes()
    plan = make_plan(table, sizes, expected_sources(table, sizes, "bfloat16"), mesh)
    parallel = Parallel(tp, ep)
    refuse_foreign(root, source.root)
    with exclusive(root):
        if is_artifact(root):
            found = Artifact(root).manifest
            refuse_another_model(root, found, source.config_digest, parallel, "Give another --output.")
            return
        files = copy_files(source.auxiliary, root, source.config_bytes)
        described = model_of(source, plan.parameters)
        draft = draft_of(source.config)
        write_manifest(root, Manifest(FORMAT, TOOL, described, parallel, files=files, draft=draft))


def compile_graphs(
    root: Path,
    target_name: str,
    tell: Callable[[str], None] | None = None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    quant: str | None = None,
    kept: GraphStore | None = None,
    fixed: Fixed | None = None,
    fused: tuple[str, ...] = (),
) -> list[Compiled]:
    """Make all graphs of a target, replacing what is there.  Proofs of other targets stay valid.  `quant`: what
    weights will be quantised to, where there are none yet.  `kept`: where graphs are taken from that were compiled
    for the same before, and left for who comes next.  `fixed`: shapes of variants that have fixed ones, which are
    made only then.  `fused`: what graphs shall have as one operation, of the target's fusions.

    A graph of compiled kernels that cannot compute this model is left out, and `tell` hears why: the target's
    other graphs serve in its place.  `progress`: hears which graph begins, how many are done, and of how many.
    Raises CannotCompute for any other graph, and for that one if nobody listens.
    """
    target = target_named(target_name)
    refuse_fusions([target], fused)
    config, types = _stored(Artifact(root), quant)
    _check_heads(config, target)
    kept = None if target.form.points_at_weights else kept  # those are of one artifact's files
    with exclusive(root), dumps_in(root / STATE_DIR / DUMPS):
        artifact = Artifact(root)
        made: list[Compiled] = []
        exports: list[bytes] = []
        wanted = [replace(w, fused=fused) for w in _wanted(artifact, target, config, types, fixed)]
        for number, local in enumerate(wanted):
            started = time.monotonic()
            progress(local.role.name, number, len(wanted))
            try:
                graph, proto, peak, taken = _taken(local, kept, tell) or _compiled(local, kept)
            except CannotCompute as e:
                if tell is None or not local.variant:
                    raise
                tell(f"left out: {e.message}")
                continue
            made.append(Compiled(graph, time.monotonic() - started, peak, taken))
            exports.append(proto)
        graphs = [m.graph for m in made]
        _check_weights(artifact, target, graphs, config.layers)
        _check_scales(artifact, graphs)
        for graph, proto in zip(graphs, exports, strict=True):
            path = root / graph.path
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, proto)
        files = _beside(artifact, target, config)
        others = [g for g in artifact.manifest.graphs if g.target != target.name]
        artifact.changed(graphs=sorted([*others, *graphs], key=lambda g: (g.target, g.name)), files=files)
        add_timings(root, ((m.graph, m.seconds) for m in made if not m.taken))
        _remove_others(artifact, target, graphs)
    return made


def refuse_fusions(targets: Iterable[Target], fused: Iterable[str]) -> None:
    """Raises UsageError for a target whose graphs cannot have all of these as one operation."""
    for target in targets:
        if unknown := next((f for f in fused if f not in target.fusions), ""):
            having = ", ".join(t.name for t in TARGETS.values() if unknown in t.fusions)
            raise UsageError(
                f"{target.name}: its graphs cannot have {unknown[:40]} fused.",
                f"Targets that can: {having}.  Compile others by a command without --fuse."
                if having
                else "No target can.",
            )


def graphs_of(config: DecoderConfig, target: Target) -> tuple[tuple[str, str], ...]:
    """(role, variant) of each graph of a model.  One that drafts by itself has those of a draft besides; one that
    drafts for another model has nothing else, and a target without such graphs raises UsageError."""
    if config.drafts_for is None:
        return (*target.graphs, *(target.draft_graphs if config.drafts else ()))
    if not target.draft_graphs:
        raise UsageError(f"{target.name}: there are no graphs of drafts for it.", "Compile for another target.")
    return target.draft_graphs


def _wanted(
    artifact: Artifact, target: Target, config: DecoderConfig, types: dict[str, str], fixed: Fixed | None
) -> Iterator[Local]:
    """A target's graphs that are to be made."""
    mesh, form, manifest = Mesh(artifact.tp, artifact.ep), target.form, artifact.manifest
    draft = manifest.draft if target.draft_graphs else None
    weights = manifest.weights if form.points_at_weights else None
    for role, variant in graphs_of(config, target):
        if fixed or variant not in target.asked:
            shapes = fixed if variant in target.asked else None
            yield Local(config, mesh, target, ROLES[role], variant, types, draft, weights, shapes)


def _taken(
    local: Local, kept: GraphStore | None, tell: Callable[[str], None] | None
) -> tuple[Graph, bytes, int, bool] | None:
    """The graph, its bytes, peak resident bytes, and that it was taken; None if there is none to trust."""
    if kept is None:
        return None
    try:
        found = kept.take(local)
    except ArtifactError as e:
        if tell is not None:
            tell(f"not taken, compiled instead: {e.message}")
        return None
    return None if found is None else (*found, peak_rss_bytes(), True)


def _compiled(local: Local, kept: GraphStore | None) -> tuple[Graph, bytes, int, bool]:
    """The same of a graph that is compiled now, and kept."""
    done = made(local)
    graph, proto = entry(local, done), done.exported.proto
    if kept is not None:
        kept.leave(local, graph, proto)
    return graph, proto, done.peak_rss_bytes, False


def _beside(artifact: Artifact, target: Target, config: DecoderConfig) -> list[File]:
    """Write the files that lie beside a target's graphs, and give all that the manifest has then.  Artifacts of
    before files had digests get none."""
    files = {f.name: f for f in artifact.manifest.files}
    if not files or not target.form.beside:
        return artifact.manifest.files
    for name, data in exporter(target).beside(artifact, config).items():
        replace_file(artifact.root / name, data)
        files[name], _ = describe_file(artifact.root / name, data)
    return list(files.values())


def _stored(artifact: Artifact, quant: str | None) -> tuple[DecoderConfig, dict[str, str]]:
    """The configuration, and the element type of each weight; {} of an artifact without weights, unless they will
    be quantised."""
    config, weights = configuration(artifact), artifact.manifest.weights
    if weights is not None:
        return config, {t.name: t.dtype for t in weights.tensors}
    made, family = format_asked(quant), family_named(artifact.manifest.model.family)
    if made is None or family is None:
        return config, {}
    sizes = config.sizes()
    sources = expected_sources(family.table, sizes, "bfloat16", quantised=True)
    plan = make_plan(family.table, sizes, sources, Mesh(artifact.tp, artifact.ep), quant=made)
    return replace(config, formats=(*config.formats, made)), {t.name: t.dtype for t in plan.tensors}


def _remove_others(artifact: Artifact, target: Target, graphs: list[Graph]) -> None:
    """Take away files of graphs that the manifest no longer has: those of an older format had other names."""
    root, kept = artifact.root, {g.path for g in graphs}
    stale = {g.path for g in artifact.manifest.graphs_for(target.name)}
    directory = Path(graphs[0].path).parent
    if directory.parts:  # one of the target's own
        stale |= {str(directory / path.name) for path in (root / directory).glob("*.mindir")}
    for path in stale - kept:
        (root / path).unlink(missing_ok=True)


def _check_heads(config: DecoderConfig, target: Target) -> None:
    """Raises UsageError for heads that the target's attention cannot take."""
    multiple, limit = target.paging.head_multiple, target.paging.head_limit
    if not limit:
        return
    widths = {"head_dim": config.head_dim}
    if mla := config.mla:
        widths = {
            "qk_nope_head_dim": mla.nope,
            "qk_rope_head_dim": mla.rope,
            "v_head_dim": mla.v_dim,
            "kv_lora_rank + qk_rope_head_dim": mla.latent,
        }
    wrong = [f"{name} {width}" for name, width in widths.items() if width % multiple or width > limit]
    if wrong:
        raise UsageError(
            f"{target.name}: its attention takes head sizes that are multiples of {multiple}, up to {limit}; this "
            "model has "
            f"{', '.join(wrong)}.",
            "Compile it for --target cpu.",
        )


def _check_weights(artifact: Artifact, target: Target, graphs: list[Graph], layers: int) -> None:
    """What the target's graphs read together is exactly what is stored, shape by shape; a draft's weights only if
    the target has graphs for drafts."""
    if artifact.manifest.weights is None:
        return
    stored = {t.name: t.shape for t in artifact.manifest.weights.tensors}
    if not target.draft_graphs:
        stored = {name: stored[name] for name in without_draft(stored, layers)}
    read = [(p.name, p.shape) for g in graphs for p in g.reads]
    if problems := misfits(stored, read):
        lines = "\n".join(f"  {p}" for p in problems[:SOME])
        raise ArtifactError(
            f"{artifact.root}: weights and {target.name} graphs do not fit:\n{lines}",
            "Convert again with --force.",
        )


def _check_scales(artifact: Artifact, graphs: list[Graph]) -> None:
    """Raises ArtifactError for scales of codes that are not of the type in which the graphs take them."""
    taken = {p.name: p.dtype for g in graphs for p in g.reads}
    if artifact.manifest.weights is None or not any(name.endswith("_scale") for name in taken):
        return
    for rank in range(artifact.tp):
        weights = RankWeights(artifact, rank)
        for name, dtype in taken.items():
            if weights.is_scale(name):
                weights.array(name, dtype)
