"""Checkpoint in, artifact out: opens, plans, streams, and writes the manifest last."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from msconv_runtime.artifact import (
    FORMAT,
    MANIFEST,
    READY,
    STATE_DIR,
    Dropped,
    File,
    Manifest,
    Model,
    Padding,
    Parallel,
    SourceFile,
    Weights,
    decode_manifest,
    digest_bytes,
    digest_of,
    is_artifact,
    read_manifest,
    replace_file,
    write_manifest,
)
from msconv_runtime.artifact.served import describe_file
from msconv_runtime.errors import ArtifactError, CheckpointError, UsageError

from . import __version__
from .checkpoint.directory import AUXILIARY, Checkpoint, open_checkpoint
from .layout.cuts import make_mesh
from .layout.names import fold
from .layout.plan import Plan
from .layout.planning import make_plan
from .stream.buffers import BufferSizes
from .stream.execute import describe, execute, plan_memory
from .stream.journal import JOURNAL, Identity, Journal
from .stream.lock import exclusive
from .stream.outputs import disk_error, whole
from .stream.source import DirectorySource, Progress, Source
from .stream.transform import Moved

if TYPE_CHECKING:
    from .checkpoint.hub import Repository  # imported when there is one: the hub's client takes a while

Publish = Callable[[Path, Manifest], object]
TOOL = f"msconv {__version__}"
REPORT = "report.html"
DOWNLOADS = "downloads"  # in STATE_DIR: shards that are deleted as they have been read


@dataclass(frozen=True)
class Conversion:
    """A planned conversion that has not started.  `describe` makes the manifest's model from what was read.
    `reads`: the directory it reads; `origin`: where that came from, a directory or owner/name@commit; `notes`:
    what people should know of it."""

    name: str
    family: str
    plan: Plan
    source: Source
    identity: Identity
    reads: Path
    origin: str
    auxiliary: list[Path]
    describe: Callable[[dict[str, Moved]], Model]
    dropped: list[Dropped]
    source_dtype: str
    output: Path
    jobs: int
    buffers: BufferSizes
    planned_memory_bytes: int
    download_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converted:
    """What a conversion did.  Bytes are those of this run; `resumed`: an earlier run had begun."""

    artifact: Path
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    resumed: bool


def prepare(
    model: Path | Repository,
    tp: int,
    ep: int = 1,
    dtype: str | None = None,
    output: Path | None = None,
    jobs: int = 1,
    max_memory: int | None = None,
    delete_source: bool = False,
    harmless: Iterable[str] = (),
) -> Conversion:
    """Read headers and plan.  Moves nothing; of a repository, only small files are downloaded.
    `delete_source`: its shards go to the output's own directory and are deleted as their bytes are in place.
    `harmless`: keys of config.json, on no list, that a person says change nothing.
    Raises any MsconvError there is to raise beforehand."""
    mesh = make_mesh(tp, ep)
    checkpoint = (
        open_checkpoint(model, harmless=harmless) if isinstance(model, Path) else _open_repository(model, harmless)
    )
    origin = recordable(model) if isinstance(model, Path) else model.reference
    plan = make_plan(checkpoint.family.table, checkpoint.config.sizes(), checkpoint.tensors, mesh, dtype)
    buffers, planned = plan_memory(plan, jobs, max_memory)
    output = output or Path("artifacts") / default_name(checkpoint.name, tp, ep)
    if delete_source:
        model = _into_own(model, output)
    return Conversion(
        name=checkpoint.name,
        family=checkpoint.family.name,
        plan=plan,
        source=_open_source(model, checkpoint),
        identity=identify((f.identity for f in checkpoint.files.values()), checkpoint.config_digest, plan),
        reads=checkpoint.root,
        origin=origin,
        notes=checkpoint.notes,
        auxiliary=checkpoint.auxiliary,
        describe=lambda moved: _model(checkpoint, plan, moved),
        dropped=_dropped(plan),
        source_dtype=plan.source_dtype,
        output=output,
        jobs=jobs,
        buffers=buffers,
        planned_memory_bytes=planned,
        download_bytes=0 if isinstance(model, Path) else missing_bytes(model, plan),
    )


def recordable(directory: Path) -> str:
    """Its whole path, as the manifest and `.msconv/source` record it.  Raises UsageError if that is no text."""
    path = str(directory.resolve())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{path}: this path is not UTF-8, and an artifact records where it came from as text.",
            "Rename it, or copy it where the whole path is UTF-8: a link there is not enough.",
        ) from None
    return path


def _open_repository(repository: Repository, harmless: Iterable[str]) -> Checkpoint:
    from .checkpoint import hub

    repository.download_small(AUXILIARY)
    return hub.open_checkpoint(repository, harmless)


def _into_own(model: Path | Repository, output: Path) -> Repository:
    if isinstance(model, Path):
        raise UsageError(
            f"{model}: is a directory; --delete-source-as-you-go deletes only what a conversion downloads itself.",
            "Leave the flag out, or give owner/name on Hugging Face.",
        )
    return replace(model, own=output / STATE_DIR / DOWNLOADS)


def _open_source(model: Path | Repository, checkpoint: Checkpoint) -> Source:
    if isinstance(model, Path):
        return DirectorySource(checkpoint.files)
    from .stream.hub_source import HubSource

    return HubSource(model, checkpoint.files, checkpoint.tensors)


def missing_bytes(repository: Repository, plan: Plan) -> int:
    """Of the shards that a conversion reads, what is not on this machine yet."""
    return repository.missing_bytes({plan.sources[n].file for n in plan.read_names})


def identify(files: Iterable[str], config_digest: str, plan: Plan) -> Identity:
    """What must stay the same for a half-done conversion to go on."""
    headers = (digest_bytes(f.header) for f in plan.files)
    return Identity(TOOL, digest_of(files), config_digest, digest_of([str(plan.mesh), plan.dtype, *headers]))


def default_name(model: str, tp: int, ep: int = 1) -> str:
    return f"{model}-tp{tp}" + (f"-ep{ep}" if ep > 1 else "")


def run(
    conversion: Conversion,
    force: bool = False,
    progress: Progress = lambda n: None,
    downloading: Progress = lambda n: None,
    publish: Publish = lambda root, manifest: None,
) -> Converted:
    """Convert, or go on with a conversion.  The artifact is READY on return.
    `progress` gets the bytes that were moved, `downloading` those that came from a hub.  `publish` may add
    what describes the artifact, when all but the manifest and READY is in place."""
    started = time.monotonic()
    root, plan, source = conversion.output, conversion.plan, conversion.source
    refuse_foreign(root, conversion.reads)
    try:
        with exclusive(root):
            if force:
                clear(root)
            previous = _finished(root, conversion)
            finished = previous if previous is not None and previous.weights is not None else None
            # not if a rank file is gone, or where the run that wrote READY did not get to its end: the disk may
            # have refused to keep it
            ended = not (root / STATE_DIR / JOURNAL).exists() and whole(root, plan, published=True)
            if finished and ended:
                publish(root, finished)
                return Converted(root, 0, 0, time.monotonic() - started, peak_rss_bytes(), True)
            with Journal.resume(root, conversion.identity) as journal:
                if finished:
                    (root / READY).unlink()
                if journal.done and not whole(root, plan):
                    journal.restart()
                if not journal.done:
                    _check_twins(plan, source, downloading)
                before = set(journal.done)
                besides = _bytes_besides(conversion)
                workers = (conversion.jobs, conversion.buffers)
                moved = execute(plan, source, root, journal, *workers, progress, besides, downloading)
                try:
                    _finish(conversion, moved, previous, publish)
                except OSError as e:
                    raise disk_error(e, root, besides) from None
                journal.remove()
            shutil.rmtree(root / STATE_DIR / DOWNLOADS, ignore_errors=True)
    finally:
        source.close()
    redone = sum(plan.unit_bytes(u) for u in plan.units if not plan.is_done(u, before))
    share = redone / max(1, plan.read_bytes)
    seconds = time.monotonic() - started
    return Converted(root, redone, round(plan.output_bytes * share), seconds, peak_rss_bytes(), bool(before))


def _finish(conversion: Conversion, moved: dict[str, Moved], previous: Manifest | None, publish: Publish) -> None:
    """Everything but the weights; the manifest and READY last."""
    root = conversion.output
    files = copy_files(conversion.auxiliary, root)
    state = root / STATE_DIR
    replace_file(state / "source", f"{conversion.origin}\n".encode())
    replace_file(state / "identity", conversion.identity.digest().encode())
    manifest = _manifest(conversion, moved, previous, files)
    publish(root, manifest)
    write_manifest(root, manifest)


def copy_files(paths: Sequence[Path], root: Path) -> list[File]:
    """Copy what a server reads besides weights and graphs, and describe each for the manifest."""
    files = []
    for path in paths:
        entry, data = describe_file(path)
        replace_file(root / path.name, data)
        files.append(entry)
    return files


def _bytes_besides(conversion: Conversion) -> int:
    """What is written besides the weights: copied files, journal, manifest (60 bytes a digest) and report."""
    plan = conversion.plan
    digests = len(plan.tensors) * (plan.mesh.tp + 4)
    return sum(p.stat().st_size for p in conversion.auxiliary) + 200 * digests + (256 << 10)


def refuse_foreign(root: Path, source: Path | None = None) -> None:
    """Raises UsageError if `root` is the source itself or holds something that msconv did not write."""
    try:
        if not root.exists():
            return
    except (OSError, ValueError):
        raise UsageError(
            f"{str(root)[:300]}: no directory can have this name.", "Give another --output."
        ) from None
    if not root.is_dir():
        raise UsageError(f"{root}: is a file, not a directory.", "Give another --output.")
    if source is not None and root.resolve() == source.resolve():
        raise UsageError(f"{root}: the output is the source directory.", "Give another --output.")
    ours = (root / STATE_DIR).is_dir() or is_artifact(root)
    if not ours and any(root.iterdir()):
        raise UsageError(
            f"{root}: holds something else than an artifact; nothing was touched.",
            "Give an empty or new directory with --output.",
        )


def _finished(root: Path, conversion: Conversion) -> Manifest | None:
    """The manifest that is already here, if it belongs to the same conversion."""
    if not is_artifact(root):
        return None
    try:
        manifest = read_manifest(root)
    except ArtifactError as e:
        if (root / STATE_DIR / JOURNAL).exists():
            return _graphs_of_unfinished(root, conversion)  # interrupted before READY
        raise ArtifactError(e.message, "Run with --force to convert anew.") from None
    mesh = conversion.plan.mesh
    if manifest.model.config_digest != conversion.identity.config or manifest.parallel != Parallel(
        mesh.tp, mesh.ep
    ):
        raise ArtifactError(
            f"{root}: holds an artifact of another model or layout "
            f"({manifest.model.source}, tp {manifest.parallel.tp}, ep {manifest.parallel.ep}).",
            "Give another --output, or replace it with --force.",
        )
    if manifest.weights is None:
        return manifest  # graphs without weights: this conversion completes them
    recorded = root / STATE_DIR / "identity"
    if not recorded.exists() or recorded.read_text() != conversion.identity.digest():
        raise ArtifactError(
            f"{root}: holds a finished artifact of another conversion (the source, --dtype or msconv changed).",
            "Give another --output, or replace it with --force.",
        )
    return manifest


def _graphs_of_unfinished(root: Path, conversion: Conversion) -> Manifest | None:
    """The manifest without its weights, for the graphs it names, if it is of this model and layout."""
    mesh = conversion.plan.mesh
    try:
        manifest = decode_manifest((root / MANIFEST).read_bytes(), str(root / MANIFEST))
    except (ArtifactError, OSError):
        return None
    same_model = manifest.model.config_digest == conversion.identity.config
    if not same_model or manifest.parallel != Parallel(mesh.tp, mesh.ep):
        return None
    return msgspec.structs.replace(manifest, weights=None)


def clear(root: Path) -> None:
    """Remove what msconv wrote, and only that.  READY goes first."""
    for name in (READY, MANIFEST, REPORT, f"{STATE_DIR}/{JOURNAL}", f"{STATE_DIR}/identity", *AUXILIARY):
        (root / name).unlink(missing_ok=True)
    for path in (root / "weights").glob("model-rank-*-part-*.safetensors*"):
        path.unlink()
    shutil.rmtree(root / "graphs", ignore_errors=True)
    shutil.rmtree(root / STATE_DIR / DOWNLOADS, ignore_errors=True)


def _check_twins(plan: Plan, source: Source, downloading: Progress) -> None:
    """A tensor dropped because another holds the same bytes must really do so."""
    source.expect([n for name, _, twin in plan.dropped if twin for n in (name, twin)], downloading)
    for name, _, twin in plan.dropped:
        if not twin:
            continue
        a, b = plan.sources[name], plan.sources[twin]
        same = (a.dtype, a.shape) == (b.dtype, b.shape)
        for begin in range(0, a.nbytes if same else 0, 4 << 20):
            n = min(4 << 20, a.nbytes - begin)
            left, right = bytearray(n), bytearray(n)
            source.read(a, begin, memoryview(left))
            source.read(b, begin, memoryview(right))
            same = same and left == right
        if not same:
            raise CheckpointError(
                f"{name}: the configuration ties it to {twin}, but its values are different.",
                'Set "tie_word_embeddings": false in config.json if the head is meant to be its own.',
            )


def _model(checkpoint: Checkpoint, plan: Plan, moved: dict[str, Moved]) -> Model:
    by_file: dict[str, list[str]] = {n: [f.header_digest] for n, f in checkpoint.files.items()}
    for name in sorted(plan.read_names, key=lambda n: plan.sources[n].offset):
        by_file[plan.sources[name].file].append(moved[name].source_digest)
    return Model(
        family=checkpoint.family.name,
        architecture=checkpoint.family.architecture,
        source=checkpoint.repository or checkpoint.name,
        config_digest=checkpoint.config_digest,
        commit=checkpoint.commit,
        parameters=plan.parameters,
        files=[SourceFile(n, f.size, digest_of(by_file[n])) for n, f in sorted(checkpoint.files.items())],
        harmless=sorted(checkpoint.harmless),
    )


def _manifest(
    conversion: Conversion, moved: dict[str, Moved], previous: Manifest | None, copied: list[File]
) -> Manifest:
    plan = conversion.plan
    files, tensors = describe(plan, moved)
    weights = Weights(
        dtype=plan.dtype,
        source_dtype=conversion.source_dtype,
        quant=plan.quant,
        digest=digest_of(f.digest for f in files),
        files=files,
        tensors=tensors,
        dropped=conversion.dropped,
        padded=[Padding("vocab", *plan.vocab)] if plan.vocab[1] > plan.vocab[0] else [],
    )
    return Manifest(
        format=FORMAT,
        tool=TOOL,
        model=conversion.describe(moved),
        parallel=Parallel(plan.mesh.tp, plan.mesh.ep),
        weights=weights,
        graphs=previous.graphs if previous else [],
        files=copied,
    )


def _dropped(plan: Plan) -> list[Dropped]:
    reasons: dict[str, list[str]] = {}
    for name, reason, _ in plan.dropped:
        reasons.setdefault(reason, []).append(name)
    return [Dropped(n, count, reason) for reason, names in reasons.items() for n, count in fold(names)]


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far.  (getrusage would report that of who started it.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
