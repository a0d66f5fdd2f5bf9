"""Resharding: another layout without the source checkpoint; padding and replication are undone and redone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.files import check_size
from msconv_runtime.artifact.served import refuse_wrong_files
from msconv_runtime.errors import ArtifactError

from ..checkpoint.directory import AUXILIARY
from ..checkpoint.reference import configuration
from ..families import family_named
from ..layout.cuts import Mesh, make_mesh
from ..layout.model import Table, TensorInfo, expected_sources
from ..layout.plan import Plan
from ..layout.planning import make_plan
from ..stream.artifact_source import ArtifactFiles, file_states
from ..stream.execute import plan_memory
from ..stream.outputs import RankFiles
from ..stream.task import Task
from ..workspace.names import default_output, recordable
from ..workspace.state import recorded_source
from .conversion import Conversion, identify


def prepare(
    root: Path,
    tp: int,
    ep: int = 1,
    output: Path | None = None,
    jobs: int = 1,
    max_memory: int | None = None,
    besides: int = 0,
) -> Conversion:
    """Plan to write the artifact at `root` anew for another mesh.  The weight files become those of a direct
    conversion, byte for byte.  `besides`: bytes that a process takes for its mover's sake."""
    mesh = make_mesh(tp, ep)
    artifact = Artifact(root)
    manifest, weights = artifact.manifest, artifact.weights
    for file in weights.files:
        check_size(root / file.path, file.size)
    config = configuration(artifact)
    table = _table(artifact)
    old = _plan_of(artifact)
    plan = replace(make_plan(table, config.sizes(), old.sources, mesh, weights.dtype), dropped=(), checked={})
    refuse_wrong_files(artifact)
    recorded = [f.name for f in manifest.files if f.name in AUXILIARY]  # the rest belongs to graphs
    buffers, planned = plan_memory(plan, jobs, max_memory, besides)
    source = ArtifactFiles(root, old, weights, file_states(root, weights))
    output = output or default_output(manifest.model.source, tp, ep)
    return Conversion(
        name=manifest.model.source,
        model=manifest.model,
        shards={},
        task=Task(plan, source, RankFiles(output, mesh.tp, len(plan.files)), buffers),
        identity=identify([weights.digest, *map(str, source.files)], manifest.model.config_digest, plan),
        reads=root,
        origin=recorded_source(root) or recordable(root),
        auxiliary=[root / n for n in recorded or AUXILIARY if (root / n).is_file()],
        dropped=weights.dropped,
        source_dtype=weights.source_dtype,
        made=weights.made,
        jobs=jobs,
        planned_memory_bytes=planned,
        draft=manifest.draft,
    )


def _table(artifact: Artifact) -> Table:
    family = family_named(artifact.manifest.model.family)
    if family is None:
        raise ArtifactError(
            f"{artifact.root}: this version has no family {artifact.manifest.model.family}.",
            "Reshard it with the version that converted it, or convert the checkpoint again.",
        )
    return family.table


def _plan_of(artifact: Artifact) -> Plan:
    """The plan the artifact was written by, made again and held against its manifest."""
    manifest, weights = artifact.manifest, artifact.weights
    mesh, config = Mesh(artifact.tp, artifact.ep), configuration(artifact)
    table = _table(artifact)
    own = {t.name: t.dtype for t in weights.tensors}
    sources = expected_sources(table, config.sizes(), weights.dtype, own)
    plan = replace(make_plan(table, config.sizes(), sources, mesh, weights.dtype), checked={})
    recorded = [(t.name, t.dtype, tuple(t.shape), t.file, t.begin, tuple(t.parts)) for t in weights.tensors]
    made = [
        (t.name, t.dtype, t.shape, t.file, len(plan.files[t.file].header) + t.begin, t.parts) for t in plan.tensors
    ]
    if recorded != made:
        raise ArtifactError(
            f"{artifact.root}: its weights are laid out by another version of msconv ({manifest.tool}).",
            "Convert the checkpoint again.",
        )
    # where each source lies in rank 0's files: what is read in one pass follows the disk
    placed: dict[str, TensorInfo] = {d.name: plan.sources[d.name] for d in plan.dropped}  # said, and not read
    for name, moves in plan.moves.items():
        info = plan.sources[name]
        file = f"part-{plan.tensors[moves[0].tensor].file}"
        placed[name] = TensorInfo(name, info.dtype, info.shape, file, plan.part_offset(moves[0]), info.nbytes)
    return Plan(**{**vars(plan), "sources": placed})
