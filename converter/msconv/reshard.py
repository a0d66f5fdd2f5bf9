"""From one layout to another without the source checkpoint: padding and replication undone and redone."""

from __future__ import annotations

from pathlib import Path

from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.files import check_size
from msconv_runtime.artifact.served import refuse_wrong_files
from msconv_runtime.errors import ArtifactError

from .checkpoint.directory import AUXILIARY
from .checkpoint.reference import configuration
from .convert import Conversion, default_name, identify, recordable
from .families import family_named
from .layout.cuts import Mesh, make_mesh
from .layout.model import Table, TensorInfo, expected_sources
from .layout.plan import Plan
from .layout.planning import make_plan
from .stream.artifact_source import ArtifactSource
from .stream.execute import plan_memory


def prepare(
    root: Path, tp: int, ep: int = 1, output: Path | None = None, jobs: int = 1, max_memory: int | None = None
) -> Conversion:
    """Plan to write the artifact at `root` anew for another mesh.  The weight files become those of a direct
    conversion, byte for byte.  `convert.run` carries it out."""
    mesh = make_mesh(tp, ep)
    artifact = Artifact(root)
    manifest, weights = artifact.manifest, artifact.weights
    for file in weights.files:
        check_size(root / file.path, file.size)
    config = configuration(artifact)
    table = _table(artifact)
    old = _plan_of(artifact)
    plan = make_plan(table, config.sizes(), old.sources, mesh, weights.dtype)
    refuse_wrong_files(artifact)
    recorded = [f.name for f in manifest.files]
    buffers, planned = plan_memory(plan, jobs, max_memory)
    stats = ((f.path, (root / f.path).stat()) for f in weights.files)
    return Conversion(
        name=manifest.model.source,
        family=manifest.model.family,
        plan=plan,
        source=ArtifactSource(root, old, weights),
        identity=identify(
            [weights.digest, *(f"{path} {s.st_size} {s.st_mtime_ns}" for path, s in stats)],
            manifest.model.config_digest,
            plan,
        ),
        reads=root,
        origin=_origin(root),
        auxiliary=[root / n for n in recorded or AUXILIARY if (root / n).is_file()],
        describe=lambda moved: manifest.model,
        dropped=weights.dropped,
        source_dtype=weights.source_dtype,
        output=output or Path("artifacts") / default_name(manifest.model.source, tp, ep),
        jobs=jobs,
        buffers=buffers,
        planned_memory_bytes=planned,
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
    plan = make_plan(table, config.sizes(), sources, mesh, weights.dtype)
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
    placed: dict[str, TensorInfo] = {}
    for name, moves in plan.moves.items():
        info = plan.sources[name]
        file = f"part-{plan.tensors[moves[0].tensor].file}"
        placed[name] = TensorInfo(name, info.dtype, info.shape, file, plan.part_offset(moves[0]), info.nbytes)
    return Plan(**{**vars(plan), "sources": placed})


def _origin(root: Path) -> str:
    """The checkpoint this all came from, so that `verify` finds it; the artifact itself if unknown."""
    try:
        return (root / ".msconv" / "source").read_text().strip()
    except OSError:
        return recordable(root)
