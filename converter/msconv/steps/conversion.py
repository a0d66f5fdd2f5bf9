"""A planned conversion, and carrying it out: weights are moved, then all else is written, the manifest last.

What is converted may be a checkpoint or an artifact of another layout: all that differs was planned before.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from msconv_runtime.artifact import (
    FORMAT,
    READY,
    Draft,
    Dropped,
    Graph,
    Manifest,
    Model,
    Parallel,
    digest_bytes,
    digest_of,
    write_manifest,
)

from ..checkpoint.directory import ShardFile
from ..layout.plan import Plan
from ..process import peak_rss_bytes
from ..stream.entries import source_files, weights_entry
from ..stream.execute import Watch, execute
from ..stream.journal import Journal
from ..stream.left_out import is_lost, refuse_lost
from ..stream.movers import Mover
from ..stream.movers.threads import LocalThreads
from ..stream.outputs import has_all_files
from ..stream.source import Progress, Source
from ..stream.task import Task
from ..stream.transform import Moved
from ..workspace.clearing import clear, clear_downloads, refuse_foreign
from ..workspace.disk import disk_error
from ..workspace.lock import exclusive
from ..workspace.names import JOURNAL, TOOL
from ..workspace.recording import Publish, copy_files
from ..workspace.state import Identity, previous_manifest, record_identity, record_source

CODES = "int8"  # the element type of matrices that are no values


@dataclass(frozen=True)
class Conversion:
    """A planned conversion that has not started: values only.

    `reads`: the directory it reads; `origin`: where that came from, a directory or owner/name@commit.
    `model`: what the manifest will say, but for the digests of `shards`, which are known when they were read.
    `config`: the artifact's config.json, b"" if it is copied.  `draft`: what its weights have to guess further
    tokens.  `notes`: what people should know of it.
    `made`: what `--quant` named, where codes are made.
    """

    name: str
    model: Model
    shards: Mapping[str, ShardFile]
    task: Task
    identity: Identity
    reads: Path
    origin: str
    auxiliary: list[Path]
    dropped: list[Dropped]
    source_dtype: str
    jobs: int
    planned_memory_bytes: int
    download_bytes: int = 0
    config: bytes = b""
    notes: tuple[str, ...] = ()
    draft: Draft | None = None
    made: str = ""

    @property
    def family(self) -> str:
        return self.model.family

    @property
    def plan(self) -> Plan:
        return self.task.plan

    @property
    def output(self) -> Path:
        """The artifact's directory."""
        return self.task.outputs.root

    @property
    def parallel(self) -> Parallel:
        return Parallel(self.plan.mesh.tp, self.plan.mesh.ep)

    @property
    def extra_bytes(self) -> int:
        """What is written besides the weights: copied files, journal, manifest (60 bytes a digest) and report."""
        digests = len(self.plan.tensors) * (self.plan.mesh.tp + 4)
        return sum(p.stat().st_size for p in self.auxiliary) + 200 * digests + (256 << 10)


@dataclass(frozen=True)
class Converted:
    """What a conversion did.  Bytes are those of this run; `resumed`: an earlier run had begun."""

    artifact: Path
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    resumed: bool


def identify(files: Iterable[str], config_digest: str, plan: Plan) -> Identity:
    """What must stay the same for a half-done conversion to go on.  `files`: what tells each source file."""
    headers = (digest_bytes(f.header) for f in plan.files)
    return Identity(TOOL, digest_of(files), config_digest, digest_of([str(plan.mesh), plan.dtype, *headers]))


def run(
    conversion: Conversion,
    force: bool = False,
    progress: Progress = lambda n: None,
    downloading: Progress = lambda n: None,
    publish: Publish = lambda root, manifest: None,
    mover: Mover | None = None,
) -> Converted:
    """Convert, or go on with a conversion.  The artifact is READY on return.
    `progress` gets the bytes that were moved, `downloading` those that came from a hub.  `publish` may add
    what describes the artifact, when all but the manifest and READY is in place.  `mover`: who moves the weights,
    by default threads of this process."""
    started = time.monotonic()
    root, plan = conversion.output, conversion.plan
    refuse_foreign(root, conversion.reads)
    mover = mover or LocalThreads(conversion.jobs)
    with exclusive(root):
        mover.check(conversion.task)
        if force:
            clear(root)
        previous = previous_manifest(root, conversion.identity, conversion.parallel)
        if previous is not None and _has_ended(conversion, previous):
            publish(root, previous)
            return Converted(root, 0, 0, time.monotonic() - started, peak_rss_bytes(), True)
        watch = Watch(progress, downloading)
        before = _convert(conversion, previous, watch, publish, mover)
        clear_downloads(root)
    redone = sum(plan.unit_bytes(u) for u in plan.units if not plan.is_done(u, before))
    share = redone / max(1, plan.read_bytes)
    seconds = time.monotonic() - started
    return Converted(root, redone, round(plan.output_bytes * share), seconds, peak_rss_bytes(), bool(before))


def nothing_done(conversion: Conversion) -> Converted:
    """What is said of a conversion that an earlier run had ended."""
    return Converted(conversion.output, 0, 0, 0.0, peak_rss_bytes(), True)


def _has_ended(conversion: Conversion, previous: Manifest) -> bool:
    """Whether nothing is left to do.  Something is, if a rank file is gone, or if the run that wrote READY did not
    get to its end: the disk may have refused to keep it."""
    if previous.weights is None or (conversion.output / JOURNAL).exists():
        return False
    return has_all_files(conversion.task.outputs, conversion.plan, only_published=True)


def _convert(
    conversion: Conversion, previous: Manifest | None, watch: Watch, publish: Publish, mover: Mover
) -> set[str]:
    """Move what is not in its place, and finish.  Returns the names that an earlier run had moved."""
    root, plan = conversion.output, conversion.plan
    source = conversion.task.source.open()
    try:
        with Journal.resume(root, conversion.identity) as journal:
            if previous is not None and previous.weights is not None:
                (root / READY).unlink()
            if journal.done and not has_all_files(conversion.task.outputs, plan):
                journal.restart()
            if not journal.done:
                _check_left_out(conversion, source, watch.downloaded)
            before = set(journal.done)
            extra_bytes = conversion.extra_bytes
            moved = execute(conversion.task, source, journal, mover, watch, extra_bytes)
            try:
                _finish(conversion, moved, previous, publish)
            except OSError as e:
                raise disk_error(e, root, extra_bytes) from None
            journal.remove()
    finally:
        source.close()
    return before


def _check_left_out(conversion: Conversion, source: Source, downloading: Progress) -> None:
    """Raises CheckpointError if leaving tensors out would lose something.  What belongs to matrices is looked at
    again as they are moved: only then, if it is still to be downloaded."""
    plan = conversion.plan
    later = {entry.name for entries in plan.checked.values() for entry in entries}
    checked = [d for d in plan.dropped if d.twin or d.is_zero]
    if conversion.download_bytes:
        checked = [d for d in checked if d.name not in later]
    source.expect([n for d in checked for n in (d.name, d.twin) if n], downloading)
    refuse_lost([d for d in checked if is_lost(plan, source, d)])


def _fitting(manifest: Manifest) -> list[Graph]:
    """The graphs that read these weights: earlier ones may be of matrices in another weight format."""
    weights = manifest.weights
    stored = {t.name: (t.shape, t.dtype == CODES) for t in weights.tensors} if weights else {}
    return [g for g in manifest.graphs if all(stored.get(p.name) == (p.shape, p.dtype == CODES) for p in g.reads)]


def _finish(
    conversion: Conversion, moved: Mapping[str, Moved], previous: Manifest | None, publish: Publish
) -> None:
    """Write everything but the weights; the manifest and READY last."""
    root, model = conversion.output, conversion.model
    copied = copy_files(conversion.auxiliary, root, conversion.config)
    record_source(root, conversion.origin)
    record_identity(root, conversion.identity)
    if conversion.shards:
        model = msgspec.structs.replace(model, files=source_files(conversion.shards, conversion.plan, moved))
    manifest = Manifest(
        format=FORMAT,
        tool=TOOL,
        model=model,
        parallel=conversion.parallel,
        weights=weights_entry(
            conversion.plan, moved, conversion.source_dtype, conversion.dropped, conversion.made
        ),
        graphs=previous.graphs if previous and previous.draft == conversion.draft else [],
        files=copied,
        draft=conversion.draft,
    )
    manifest = msgspec.structs.replace(manifest, graphs=_fitting(manifest))
    publish(root, manifest)
    write_manifest(root, manifest)
